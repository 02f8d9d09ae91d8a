"""Datasets of micro-batches for VAE and latent training; everything random is keyed by (seed, step, position)."""

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from text_encoder import TextEncoder

from ..diffusion.chain import GRID_SIZES, noisier_timesteps
from ..errors import LatentDiffError
from ..sections import DataConfig
from .cache import LatentCache, TextCache, read_pixels
from .order import BatchPlan, random_stream
from .pictures import PictureError
from .sources import Source
from .workers import load_ahead

Broken = list[tuple[str, str]]  # pictures that could not be read: (name, reason)


class PixelBatch(NamedTuple):
    """A micro-batch for VAE training."""

    images: Tensor  # (B, H, W, 3) uint8
    noise: Tensor  # (B, c, h, w) standard normal, to sample from the posterior
    broken: Broken


class Tokens(NamedTuple):
    """Tokenized captions, for a text encoder whose features are not cached."""

    tokens: Tensor  # (B, L) int64
    context_mask: Tensor  # (B, L) bool, True = real token


class Chain(NamedTuple):
    """Noisier states for half of a micro-batch, see diffusion/chain.py."""

    rows: Tensor  # (B/2,) int64, places in the micro-batch
    times: Tensor  # (B/2, K) int64, rising; a repeated one ends the chain
    noise: Tensor  # (B/2, K, c, h, w)


class CachedBatch(NamedTuple):
    """A micro-batch for latent training, read from the cache."""

    x0: Tensor  # (B, c, h, w) sampled from the cached posteriors
    noise: Tensor  # (B, c, h, w)
    t: Tensor  # (B,) int64
    text: Tensor | Tokens  # features (B, L, D) float16 of a frozen text encoder, or tokens
    broken: Broken
    chain: Chain | None = None  # for a UNet that attends to earlier steps


class RawBatch(NamedTuple):
    """A micro-batch for latent training without a cache: its pictures are encoded during the step."""

    images: Tensor  # (B, H, W, 3) uint8
    posterior_noise: Tensor  # (B, c, h, w) standard normal, to sample from the posterior
    noise: Tensor  # (B, c, h, w)
    t: Tensor  # (B,) int64
    text: Tensor | Tokens
    broken: Broken
    chain: Chain | None = None


LatentBatch = CachedBatch | RawBatch


class PixelBatches(Dataset[PixelBatch]):
    """Micro-batches for VAE training."""

    def __init__(
        self, source: Source, config: DataConfig, plan: BatchPlan, seed: int, latent_shape: tuple[int, ...]
    ) -> None:
        self.source, self.config, self.plan, self.seed = source, config, plan, seed
        self.latent_shape = latent_shape

    def __getitem__(self, number: int) -> PixelBatch:
        broken: Broken = []
        images, noises = [], []
        for _, index, random in self.plan.items(number, len(self.source), self.seed, "train_vae"):
            flip = random.random() < 0.5 and self.config.flip
            images.append(_read_or_next(self.source, index, self.config, flip, broken)[0])
            noises.append(random.standard_normal(self.latent_shape, dtype=np.float32))
        return PixelBatch(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(noises)), broken)


@dataclass(eq=False)
class LatentBatches(Dataset[LatentBatch]):
    """Micro-batches for latent training: latents or pictures, timesteps, noise and captions.

    Each picture gets one of its captions at random, or with probability `caption_dropout` the empty prompt. Timesteps
    are stratified over the global batch (arXiv 2107.00630, appendix I.1): position i of B samples from stratum i of B.
    With `history`, every second position also gets a chain of noisier states, alternating from step to step.
    """

    source: Source
    config: DataConfig
    plan: BatchPlan
    seed: int
    latent_shape: tuple[int, ...]
    _: KW_ONLY
    num_timesteps: int
    caption_dropout: float
    latents: LatentCache | None
    text: InitVar[TextCache | TextEncoder]
    history: int = 0  # noisier states of a chain

    def __post_init__(self, text: TextCache | TextEncoder) -> None:
        check_halves(self.history, self.plan.pictures_per_pass)
        self.features = text if isinstance(text, TextCache) else None
        if not isinstance(text, TextCache):  # all that workers need of the text encoder
            self.tokenizer, self.max_length = text.tokenizer, text.max_length

    def __getitem__(self, number: int) -> LatentBatch:
        plan, rows = self.plan, []
        for i, index, random in plan.items(number, len(self.source), self.seed, "train_latent"):
            rows.append(self.row(index, random, (i, plan.batch_size)))
            if self.history and (i + number // plan.accumulation_steps) % 2 == 0:
                rows[-1]["chain"] = self.sample_chain(random, int(rows[-1]["t"]))
        return self.collate(rows)

    def sample_chain(self, random: np.random.Generator, t: int) -> tuple[Tensor, Tensor]:
        """Draw the timesteps (K,) and the noise (K, c, h, w) of a chain from t, with the gaps of a sampling grid."""
        fewest, most = (min(size, self.num_timesteps) for size in GRID_SIZES)
        times = noisier_timesteps(t, int(random.integers(fewest, most + 1)), self.history, self.num_timesteps)
        noise = random.standard_normal((self.history, *self.latent_shape), dtype=np.float32)
        return torch.tensor(times), torch.from_numpy(noise)

    def collate(self, rows: list[dict[str, Any]]) -> LatentBatch:
        """Stack rows into a micro-batch."""
        chains = {place: row.pop("chain") for place, row in enumerate(rows) if "chain" in row}
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        broken = [entry for entries in columns.pop("broken") for entry in entries]
        captions = columns.pop("caption", None)
        parts: dict[str, Any] = {name: torch.from_numpy(np.stack(column)) for name, column in columns.items()}
        if captions is not None:
            captions = [unicodedata.normalize("NFC", caption) for caption in captions]  # as TextEncoder does
            ids = self.tokenizer(captions, padding="max_length", truncation=True, max_length=self.max_length,
                                 return_tensors="pt")  # fmt: skip
            parts["text"] = Tokens(ids["input_ids"], ids["attention_mask"].bool())
        if chains:
            times, noise = (torch.stack(column) for column in zip(*chains.values(), strict=True))
            parts["chain"] = Chain(torch.tensor(list(chains)), times, noise)
        return (RawBatch if self.latents is None else CachedBatch)(**parts, broken=broken)

    def row(self, index: int, random: np.random.Generator, stratum: tuple[int, int]) -> dict[str, Any]:
        """Build one picture's row of the batch, drawing all its random numbers from `random` in a fixed order."""
        row: dict[str, Any] = {"broken": []}
        flip = bool(random.random() < 0.5 and self.config.flip)
        if self.latents is not None:
            good = self.latents.good
            while not good[index]:
                index = (index + 1) % len(good)
        choice, drop = random.random(), random.random() < self.caption_dropout
        row["t"] = sample_timestep(random, stratum, self.num_timesteps)
        posterior_noise = random.standard_normal(self.latent_shape, dtype=np.float32)
        row["noise"] = random.standard_normal(self.latent_shape, dtype=np.float32)
        if self.latents is not None:
            mean, logvar = self.latents.moments(index, flip)
            row["x0"] = mean + np.exp(0.5 * logvar) * posterior_noise
        else:
            row["images"], index = _read_or_next(self.source, index, self.config, flip, row["broken"])
            row["posterior_noise"] = posterior_noise
        captions = self.source.captions(index)
        chosen = None if drop or not captions else int(choice * len(captions))
        if self.features is not None:
            row["text"] = self.features.features(index, chosen)
        else:
            row["caption"] = "" if chosen is None else captions[chosen]
        return row


def check_halves(history: int, pictures_per_pass: int) -> None:
    """Raise unless half of the pictures of a pass can have a history, the same half for any number of processes."""
    if history and pictures_per_pass % 2:
        raise LatentDiffError(
            f"unet.trajectory_attention={history}: half of the pictures of a pass have a history, so their number must "
            f"be even, not {pictures_per_pass}; change train_latent.batch_size or train_latent.micro_batch_size"
        )


def sample_timestep(random: np.random.Generator, stratum: tuple[int, int], num_timesteps: int) -> np.int64:
    """Sample t uniformly from the i-th of n equal parts of the range 0 ... T - 1, where `stratum` is (i, n)."""
    part, num_parts = stratum
    return np.int64(min(int((part + random.random()) / num_parts * num_timesteps), num_timesteps - 1))


class ValidationBatches(Dataset[LatentBatch]):
    """Held-out pictures with fixed noise and timesteps: each picture appears once in every band of timesteps."""

    def __init__(self, rows: LatentBatches, num_pictures: int, num_bands: int) -> None:
        self.rows, self.num_bands, self.batch_size = rows, num_bands, rows.plan.batch_size
        good = rows.latents.good if rows.latents is not None else np.ones(len(rows.source), dtype=bool)
        self.pictures = np.flatnonzero(good)[:num_pictures]

    def __len__(self) -> int:
        return math.ceil(len(self.pictures) / self.batch_size) * self.num_bands

    def __getitem__(self, number: int) -> LatentBatch:
        block, band = divmod(number, self.num_bands)
        rows, stratum = self.rows, (band, self.num_bands)
        pictures = self.pictures[block * self.batch_size : (block + 1) * self.batch_size].tolist()
        return rows.collate([rows.row(i, random_stream(rows.seed, "validation", band, i), stratum) for i in pictures])

    def band(self, number: int) -> int:
        """Return the timestep band of micro-batch `number`."""
        return number % self.num_bands


def micro_batches(
    dataset: Dataset[Any], plan: BatchPlan, start: int, stop: int, workers: int, pin: bool
) -> Iterator[list[Any]]:
    """Yield the micro-batches of steps start ... stop - 1, one list per step; `workers` processes load ahead."""
    numbers = range(start * plan.accumulation_steps, stop * plan.accumulation_steps)
    batches = load_ahead(dataset, numbers, workers, pin=pin)
    for _ in range(start, stop):
        yield [next(batches) for _ in range(plan.accumulation_steps)]


def _read_or_next(
    source: Source, index: int, config: DataConfig, flip: bool, broken: Broken
) -> tuple[NDArray[np.uint8], int]:
    """Read the picture, or else the next readable one, and return its index; failures are appended to `broken`."""
    reason = ""
    for offset in range(len(source)):
        candidate = (index + offset) % len(source)
        try:
            image = read_pixels(source, candidate, config)
            return (image[:, ::-1] if flip else image), candidate
        except PictureError as error:
            broken.append((source.name(candidate), error.reason))
            reason = reason or str(error)
    raise LatentDiffError(f"none of the {len(source)} pictures is usable; for example, {source.name(index)}: {reason}")
