"""The two caches of latent training: latent moments, and text features if the text encoder is frozen.

Each is keyed by everything it was computed from: weights, transform, picture bytes, captions.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from text_encoder import TextEncoder, TokenOverflowWarning
from vae import VAE

from ..device import without_tf32
from ..errors import LatentDiffError
from ..sections import DataConfig
from .pictures import PictureError, fit, open_picture, to_pixels
from .shards import Arrays, Processes, Progress, Shards, SingleProcess, digest
from .sources import Source
from .workers import choose_workers, load_ahead

CAPTION_BATCH = 32  # captions per forward pass
TRANSFORM_KEYS = {"image_size", "min_size", "max_pixels", "background", "image_column"}  # the pixels depend on these


def read_pixels(source: Source, index: int, config: DataConfig) -> NDArray[np.uint8]:
    """Read a picture as uint8 (H, W, 3); raises `PictureError` if it is broken, too small or too large."""
    return decode_pixels(source.read(index), config)


def decode_pixels(data: bytes, config: DataConfig) -> NDArray[np.uint8]:
    """Decode a picture's bytes; see `read_pixels`."""
    image = open_picture(data, max_pixels=config.max_pixels, background=config.background)
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


def text_encoder_digest(encoder: TextEncoder) -> str:
    """Return a digest of all that the features of a text depend on."""
    config: Any = encoder.model.config
    return digest({"weights": weights_digest(encoder.model), "config": config.to_json_string(),
                   "length": encoder.max_length, "mask": encoder.use_attention_mask,
                   "tokenizer": encoder.tokenizer.backend_tokenizer.to_str()})  # fmt: skip


def pictures_digest(source: Source, memo: Path) -> str:
    """Return the SHA-256 of all pictures' bytes, memoized in file `memo` until a size or modification time changes."""
    stat = source.stat_fingerprint()
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["stat"] == stat:
            return str(known["sha256"])
    indices = tqdm(range(len(source)), desc="reading pictures", unit="", leave=False)
    return record_digest(source, memo, (_read_once(source, index)[1] for index in indices))


def record_digest(source: Source, memo: Path, summaries: Iterable[bytes]) -> str:
    """Return the `pictures_digest` of pictures that have been read, and write it to `memo`."""
    hasher = hashlib.sha256()
    for summary in summaries:
        hasher.update(summary)
    memo.parent.mkdir(parents=True, exist_ok=True)
    memo.write_text(json.dumps({"stat": source.stat_fingerprint(), "sha256": hasher.hexdigest()}), encoding="utf-8")
    return hasher.hexdigest()


def _read_once(source: Source, index: int) -> tuple[bytes, bytes]:
    """Return a picture's bytes and their SHA-256, or no bytes and the reason why they cannot be read."""
    try:
        data = source.read(index)
    except PictureError as error:
        return b"", error.reason.encode()
    return data, hashlib.sha256(data).digest()


class PictureBatch(NamedTuple):
    """Pictures that are encoded together."""

    images: Tensor  # (B, H, W, 3) uint8, zero for broken pictures
    good: Tensor  # (B,) uint8, 0 for broken pictures
    summaries: Tensor  # (B, 33) uint8: what the picture's bytes add to `pictures_digest`, and before it the length


class PictureBatches(Dataset[PictureBatch]):
    """Pictures of a source in batches, each read once."""

    def __init__(self, source: Source, config: DataConfig, batches: Sequence[range]) -> None:
        self.source, self.config, self.batches = source, config, batches

    def __getitem__(self, number: int) -> PictureBatch:
        batch, size = self.batches[number], self.config.image_size
        images = np.zeros((len(batch), size, size, 3), dtype=np.uint8)
        good, summaries = np.zeros(len(batch), dtype=np.uint8), np.zeros((len(batch), 33), dtype=np.uint8)
        for place, index in enumerate(batch):
            data, summary = _read_once(self.source, index)
            summaries[place, : 1 + len(summary)] = [len(summary), *summary]
            with suppress(PictureError):
                images[place] = decode_pixels(data, self.config)
                good[place] = 1
        return PictureBatch(*map(torch.from_numpy, (images, good, summaries)))

    def load(self, workers: int) -> Iterator[PictureBatch]:
        """Yield all batches, read ahead by worker processes: as many as given, or if 0, as many as are useful."""
        workers = choose_workers(workers, len(self.batches))
        return load_ahead(self, range(len(self.batches)), workers, prefetch=2)


def in_batches(rows: range, size: int) -> list[range]:
    """Split a range of rows into batches; the last one may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@without_tf32()
def encode_pictures(vae: VAE, batch: PictureBatch, num_flips: int) -> tuple[Tensor, list[Tensor]]:
    """Return the pixels of pictures and the encoder's outputs for them and, with two flips, for them mirrored."""
    x = to_pixels(batch.images.to(next(vae.parameters()).device))
    return x, [vae.encoder_output(pixels) for pixels in [x, x.flip(3)][:num_flips]]


Encoded = tuple[list[Tensor], Tensor]  # the encoder's outputs, plain and mirrored; which pictures could be read, (B,)


class LatentCache:
    """Float16 mean and log-variance of every picture's scaled latents; with `flips`, also of the mirrored picture's.

    `encoded` yields what the encoder made of batches of pictures, where that is known; else they are encoded, and read
    by `workers` processes (0: as many as are useful).
    """

    def __init__(
        self, folder: Path, source: Source, vae: VAE, config: DataConfig, *, flips: bool, memo: Path,
        encoded: Callable[[Sequence[range]], Iterator[Encoded]] | None = None, workers: int = 0,
    ) -> None:  # fmt: skip
        self.source, self.vae, self.config, self.encoded, self.workers = source, vae, config, encoded, workers
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

    def build(self, processes: Processes = SingleProcess(), label: str | None = None) -> None:  # noqa: B008
        """Encode what is missing; raises LatentDiffError if more pictures are broken than `data.max_broken` allows."""
        self.shards.build(self._compute, processes, label)
        self.good = self.shards.column("good").astype(bool)
        check_broken(int((~self.good).sum()), len(self.good), self.config.max_broken)
        if not self.good.any():
            raise LatentDiffError(f"none of the {len(self.good)} pictures is usable")

    def moments(self, index: int, flip: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the mean and log-variance of a picture's latents, (c, h, w) each."""
        mean, logvar = np.split(self.shards["moments", index][int(flip) % self.num_flips].astype(np.float32), 2)
        return mean, logvar

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "vae": None, "encoded": None}  # workers only read

    @torch.inference_mode()
    def _compute(self, ranges: Sequence[range], progress: Progress) -> Iterator[Arrays]:
        size = encode_batch_size(self.config.image_size)
        batches = [batch for rows in ranges for batch in in_batches(rows, size)]
        encoded = self.encoded(batches) if self.encoded is not None else self._encode(batches)
        for rows in ranges:
            moments, good = [], []
            for batch in in_batches(rows, size):
                outputs, readable = next(encoded)
                posteriors = [self.vae.scale_posterior(self.vae.posterior_from(output)) for output in outputs]
                block = torch.stack([torch.cat([p.mean, p.logvar], 1) for p in posteriors], 1)
                moments.append(block.to("cpu", torch.float16).numpy())
                good.append(readable.numpy().astype(np.uint8))
                progress(len(batch))
            yield {"moments": np.concatenate(moments), "good": np.concatenate(good)}

    def _encode(self, batches: Sequence[range]) -> Iterator[Encoded]:
        for batch in PictureBatches(self.source, self.config, batches).load(self.workers):
            yield encode_pictures(self.vae, batch, self.num_flips)[1], batch.good


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
        inputs = {
            "kind": "text",
            "version": 1,
            "text_encoder": text_encoder_digest(encoder),
            "captions": hasher.hexdigest(),
        }
        self.shards = Shards(folder, inputs, len(self._captions) + 1)

    def build(self, processes: Processes = SingleProcess(), label: str | None = None) -> None:  # noqa: B008
        """Encode what is missing."""
        self.shards.build(self._compute, processes, label)
        self._captions = []

    def features(self, picture: int, caption: int | None) -> NDArray[np.float16]:
        """Return the features (L, D) of one of a picture's captions, or of the empty prompt if `caption` is None."""
        row = self.shards.num_rows - 1 if caption is None else int(self.first[picture]) + caption
        return self.shards["context", row]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "encoder": None, "_captions": []}

    @torch.inference_mode()
    def _compute(self, ranges: Sequence[range], progress: Progress) -> Iterator[Arrays]:
        for rows in ranges:
            blocks = []
            for chosen in in_batches(rows, CAPTION_BATCH):
                captions = [self._captions[row] if row < len(self._captions) else "" for row in chosen]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", TokenOverflowWarning)  # counted by `latentdiff data check`
                    blocks.append(self.encoder(captions).to("cpu", torch.float16).numpy())
                progress(len(chosen))
            yield {"context": np.concatenate(blocks)}


def check_broken(broken: int, total: int, allowed: float) -> None:
    """Raise if the share of broken pictures exceeds `allowed` (`data.max_broken`)."""
    if broken > allowed * total:
        raise LatentDiffError(
            f"{broken} of {total} pictures are broken ({broken / total:.1%}), more than data.max_broken={allowed:g} "
            "allows: raise it and resume, or start over without them in another output: `latentdiff data check` writes "
            "a list for data.quarantine"
        )
