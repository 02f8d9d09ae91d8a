"""Micro-batches of both trainings, drawn by (seed, step, place): datasets whose index is a micro-batch's number."""

import math
import signal
from collections.abc import Iterator
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from text_encoder import TextEncoder

from ..errors import LatentDiffError
from ..sections import DataConfig
from .cache import LatentCache, TextCache, read_pixels
from .order import BatchPlan, draws
from .pictures import PictureError
from .sources import Source

Broken = list[tuple[str, str]]  # names of pictures that could not be read, and why


class PixelBatch(NamedTuple):
    """A micro-batch of VAE training."""

    images: Tensor  # (B, H, W, 3) uint8
    noise: Tensor  # (B, c, h, w) standard normal, for the draw from the posterior
    broken: Broken


class Tokens(NamedTuple):
    """Captions for a text encoder that is trained or not cached."""

    tokens: Tensor  # (B, L) int64
    context_mask: Tensor  # (B, L) bool, True = real token


class CachedBatch(NamedTuple):
    """A micro-batch of latent training, from the cache."""

    x0: Tensor  # (B, c, h, w) drawn from the cached posteriors
    noise: Tensor  # (B, c, h, w)
    t: Tensor  # (B,) int64
    text: Tensor | Tokens  # features (B, L, D) float16 of a frozen text encoder, or tokens
    broken: Broken


class RawBatch(NamedTuple):
    """A micro-batch of latent training, of pictures that are encoded when they are used."""

    images: Tensor  # (B, H, W, 3) uint8
    posterior_noise: Tensor  # (B, c, h, w) standard normal, for the draw from the posterior
    noise: Tensor  # (B, c, h, w)
    t: Tensor  # (B,) int64
    text: Tensor | Tokens
    broken: Broken


LatentBatch = CachedBatch | RawBatch


class PixelBatches(Dataset[PixelBatch]):
    """Pictures for VAE training."""

    def __init__(
        self, source: Source, config: DataConfig, plan: BatchPlan, seed: int, latent_shape: tuple[int, ...]
    ) -> None:
        self.source, self.config, self.plan, self.seed = source, config, plan, seed
        self.latent_shape = latent_shape

    def __getitem__(self, number: int) -> PixelBatch:
        broken: Broken = []
        images, noises = [], []
        for _, index, random in self.plan.drawn(number, len(self.source), self.seed, "train_vae"):
            flip = random.random() < 0.5 and self.config.flip
            images.append(_readable(self.source, index, self.config, flip, broken)[0])
            noises.append(random.standard_normal(self.latent_shape, dtype=np.float32))
        return PixelBatch(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(noises)), broken)


@dataclass(eq=False)
class LatentBatches(Dataset[LatentBatch]):
    """Latents, timesteps, noise and captions for latent training.

    Of a picture's captions one is drawn, and replaced by the empty prompt with probability `caption_dropout`. Timesteps
    are stratified over the global batch (arXiv 2107.00630, appendix I.1): place i of B draws from the i-th of B parts.
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

    def __post_init__(self, text: TextCache | TextEncoder) -> None:
        self.features = text if isinstance(text, TextCache) else None
        if not isinstance(text, TextCache):  # of the text encoder no more than workers need
            self.tokenizer, self.max_length = text.tokenizer, text.max_length

    def __getitem__(self, number: int) -> LatentBatch:
        drawn = self.plan.drawn(number, len(self.source), self.seed, "train_latent")
        return self.collect([self.row(index, random, (place, self.plan.batch_size)) for place, index, random in drawn])

    def collect(self, rows: list[dict[str, Any]]) -> LatentBatch:
        """Rows as one micro-batch."""
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        broken = [entry for entries in columns.pop("broken") for entry in entries]
        captions = columns.pop("caption", None)
        parts: dict[str, Any] = {name: torch.from_numpy(np.stack(column)) for name, column in columns.items()}
        if captions is not None:
            ids = self.tokenizer(captions, padding="max_length", truncation=True, max_length=self.max_length,
                                 return_tensors="pt")  # fmt: skip
            parts["text"] = Tokens(ids["input_ids"], ids["attention_mask"].bool())
        return (RawBatch if self.latents is None else CachedBatch)(**parts, broken=broken)

    def row(self, index: int, random: np.random.Generator, stratum: tuple[int, int]) -> dict[str, Any]:
        """Everything random about one picture, in this order, from its own generator.

        Args:
            index: the picture.
            random: its numbers.
            stratum: i and n: the timestep is drawn from the i-th of n equal parts.
        """
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
            row["images"], index = _readable(self.source, index, self.config, flip, row["broken"])
            row["posterior_noise"] = posterior_noise
        captions = self.source.captions(index)
        number = None if drop or not captions else int(choice * len(captions))
        if self.features is not None:
            row["text"] = self.features.features(index, number)
        else:
            row["caption"] = "" if number is None else captions[number]
        return row


def sample_timestep(random: np.random.Generator, stratum: tuple[int, int], num_timesteps: int) -> np.int64:
    """t, uniform over the i-th of n equal parts of 0 ... T-1, where `stratum` is (i, n)."""
    part, parts = stratum
    return np.int64(min(int((part + random.random()) / parts * num_timesteps), num_timesteps - 1))


class ValidationBatches(Dataset[LatentBatch]):
    """Held-out pictures with noise and timesteps that never change: picture i once in every band of timesteps."""

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
        return rows.collect([rows.row(i, draws(rows.seed, "validation", band, i), stratum) for i in pictures])

    def band(self, number: int) -> int:
        """The band of timesteps of a batch."""
        return number % self.num_bands


def micro_batches(
    dataset: Dataset[Any], plan: BatchPlan, start: int, stop: int, workers: int, pin: bool
) -> Iterator[list[Any]]:
    """The micro-batches of steps start ... stop - 1, a list a step; `workers` processes read ahead."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start * plan.accumulation_steps, stop * plan.accumulation_steps),
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        timeout=600 if workers else 0,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    numbers = iter(loader)
    for _ in range(start, stop):
        yield [next(numbers) for _ in range(plan.accumulation_steps)]


def _leave_signals_to_the_trainer(_: int) -> None:
    """A scheduler signals the whole group; a worker that died of it would take the trainer along, nothing saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _readable(
    source: Source, index: int, config: DataConfig, flip: bool, broken: Broken
) -> tuple[NDArray[np.uint8], int]:
    """The picture, or the next that can be read, and which it is: a broken one changes nothing but its own place."""
    reason = ""
    for offset in range(len(source)):
        candidate = (index + offset) % len(source)
        try:
            image = read_pixels(source, candidate, config)
            return (image[:, ::-1] if flip else image), candidate
        except PictureError as error:
            broken.append((source.name(candidate), error.reason))
            reason = reason or str(error)
    raise LatentDiffError(f"none of the {len(source)} pictures can be used; {source.name(index)}: {reason}")
