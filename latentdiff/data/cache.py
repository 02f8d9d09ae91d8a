"""The two caches of latent training: latent moments, and text features if the text encoder is frozen.

Each is keyed by everything it was computed from: weights, transform, picture bytes, captions.
"""

import hashlib
import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from text_encoder import TextEncoder, TokenOverflowWarning
from vae import VAE

from ..errors import LatentDiffError
from ..sections import DataConfig
from .pictures import PictureError, fit, open_picture, to_pixels
from .shards import Arrays, Processes, Progress, Shards, SingleProcess, digest
from .sources import Source

CAPTION_BATCH = 32  # captions per forward pass
TRANSFORM_KEYS = {"image_size", "min_size", "max_pixels", "background", "image_column"}  # the pixels depend on these


def read_pixels(source: Source, index: int, config: DataConfig) -> NDArray[np.uint8]:
    """Read a picture as uint8 (H, W, 3); raises `PictureError` if it is broken, too small or too large."""
    image = open_picture(source.read(index), max_pixels=config.max_pixels, background=config.background)
    return fit(image, config.image_size, min_size=config.min_size or config.image_size)


def encode_batch_size(image_size: int) -> int:
    """Return how many pictures to encode per pass: 32 up to 256 px, fewer above. Fixed, because it affects rounding."""
    return max(1, min(32, 32 * 256**2 // image_size**2))


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of all weights (name, dtype, shape, bytes) except BERT's pooler, which is never used."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith("pooler."):
            values = tensor.detach().cpu().contiguous()
            hasher.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            hasher.update(values.reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


def pictures_digest(source: Source, memo: Path) -> str:
    """Return the SHA-256 of all pictures' bytes, memoized in file `memo` until a size or modification time changes."""
    stat = source.stat_fingerprint()
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["stat"] == stat:
            return str(known["sha256"])
    hasher = hashlib.sha256()
    for index in tqdm(range(len(source)), desc="reading pictures", unit="", leave=False):
        try:
            hasher.update(hashlib.sha256(source.read(index)).digest())
        except PictureError as error:
            hasher.update(error.reason.encode())
    memo.parent.mkdir(parents=True, exist_ok=True)
    memo.write_text(json.dumps({"stat": stat, "sha256": hasher.hexdigest()}), encoding="utf-8")
    return hasher.hexdigest()


class LatentCache:
    """Float16 mean and log-variance of every picture's scaled latents; with `flips`, also of the mirrored picture's."""

    def __init__(self, folder: Path, source: Source, vae: VAE, config: DataConfig, *, flips: bool, memo: Path) -> None:
        self.source, self.vae, self.config = source, vae, config
        self.num_flips = 2 if flips else 1
        inputs = {
            "kind": "latents",
            "version": 1,
            "vae": digest({"weights": weights_digest(vae), "config": vae.config.to_diffusers()}),
            "transform": config.model_dump(mode="json", include=TRANSFORM_KEYS),
            "pictures": pictures_digest(source, memo),
            "flips": self.num_flips,
        }
        self.shards = Shards(folder, inputs, len(source))
        self.good: NDArray[np.bool_] = np.zeros(0, dtype=bool)  # which pictures could be read

    def build(self, processes: Processes = SingleProcess(), progress: Progress = lambda _: None) -> None:  # noqa: B008
        """Encode what is missing; raises LatentDiffError if more pictures are broken than `data.max_broken` allows."""
        self.shards.build(self._compute, processes, progress)
        self.good = self.shards.column("good").astype(bool)
        check_broken(int((~self.good).sum()), len(self.good), self.config.max_broken)
        if not self.good.any():
            raise LatentDiffError(f"none of the {len(self.good)} pictures is usable")

    def moments(self, index: int, flip: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the mean and log-variance of a picture's latents, (c, h, w) each."""
        mean, logvar = np.split(self.shards["moments", index][int(flip) % self.num_flips].astype(np.float32), 2)
        return mean, logvar

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "vae": None}  # workers only read

    @torch.inference_mode()
    def _compute(self, rows: range, progress: Progress) -> Arrays:
        good, blocks = np.zeros(len(rows), dtype=np.uint8), []
        size, count = self.config.image_size, encode_batch_size(self.config.image_size)
        for start in range(0, len(rows), count):
            batch = rows[start : start + count]
            pixels = np.zeros((len(batch), size, size, 3), dtype=np.uint8)
            for i, index in enumerate(batch):
                with suppress(PictureError):
                    pixels[i] = read_pixels(self.source, index, self.config)
                    good[start + i] = 1
            x = to_pixels(torch.from_numpy(pixels).to(next(self.vae.parameters()).device))
            posteriors = map(self.vae.latent_posterior, [x, x.flip(3)][: self.num_flips])
            moments = torch.stack([torch.cat([p.mean, p.logvar], 1) for p in posteriors], 1)
            blocks.append(moments.to("cpu", torch.float16).numpy())
            progress(len(batch))
        return {"moments": np.concatenate(blocks), "good": good}


class TextCache:
    """Float16 features (L, D) of every caption and of the empty prompt, for a frozen text encoder."""

    def __init__(self, folder: Path, source: Source, encoder: TextEncoder) -> None:
        self.encoder = encoder
        hasher, counts, self._captions = hashlib.sha256(), [0], []
        for captions in source.all_captions():
            counts.append(len(captions))
            hasher.update(json.dumps(captions).encode())
            self._captions += captions
        self.first: NDArray[np.int64] = np.cumsum(counts, dtype=np.int64)  # row of each picture's first caption
        config: Any = encoder.model.config
        inputs = {
            "kind": "text",
            "version": 1,
            "text_encoder": digest({"weights": weights_digest(encoder.model), "config": config.to_json_string(),
                                    "length": encoder.max_length, "mask": encoder.use_attention_mask,
                                    "tokenizer": encoder.tokenizer.backend_tokenizer.to_str()}),
            "captions": hasher.hexdigest(),
        }  # fmt: skip
        self.shards = Shards(folder, inputs, len(self._captions) + 1)

    def build(self, processes: Processes = SingleProcess(), progress: Progress = lambda _: None) -> None:  # noqa: B008
        """Encode what is missing."""
        self.shards.build(self._compute, processes, progress)
        self._captions = []

    def features(self, picture: int, caption: int | None) -> NDArray[np.float16]:
        """Return the features (L, D) of one of a picture's captions, or of the empty prompt if `caption` is None."""
        row = self.shards.num_rows - 1 if caption is None else int(self.first[picture]) + caption
        return self.shards["context", row]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "encoder": None, "_captions": []}

    @torch.inference_mode()
    def _compute(self, rows: range, progress: Progress) -> Arrays:
        blocks = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TokenOverflowWarning)  # counted by `latentdiff data check`
            for start in range(0, len(rows), CAPTION_BATCH):
                chosen = rows[start : start + CAPTION_BATCH]
                captions = [self._captions[row] if row < len(self._captions) else "" for row in chosen]
                blocks.append(self.encoder(captions).to("cpu", torch.float16).numpy())
                progress(len(chosen))
        return {"context": np.concatenate(blocks)}


def check_broken(broken: int, total: int, allowed: float) -> None:
    """Raise if the share of broken pictures exceeds `allowed` (`data.max_broken`)."""
    if broken > allowed * total:
        raise LatentDiffError(
            f"{broken} of {total} pictures are broken ({broken / total:.1%}), more than data.max_broken={allowed:g} "
            "allows: raise it and resume, or start over without them: `latentdiff data check` writes a list for "
            "data.quarantine"
        )
