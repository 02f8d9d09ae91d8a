"""Micro-batches of both trainings, drawn by (seed, step, place): datasets whose index is a micro-batch's number."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from text_encoder import TextEncoder

from ..errors import LatentDiffError
from .cache import LatentCache, TextCache, read_pixels
from .order import BatchPlan, draws, shuffled
from .pictures import PictureError
from .sources import Source

if TYPE_CHECKING:
    from ..sections import DataConfig

Broken = list[tuple[str, str]]  # names of pictures that could not be read, and why


class PixelBatch(NamedTuple):
    """A micro-batch of VAE training."""

    images: Tensor  # (B, H, W, 3) uint8
    noise: Tensor  # (B, c, h, w) standard normal, for the draw from the posterior
    broken: Broken


class LatentBatch(NamedTuple):
    """A micro-batch of latent training: either x0 or images, either context or tokens."""

    x0: Tensor | None  # (B, c, h, w) draws from the cached posteriors
    images: Tensor | None  # (B, H, W, 3) uint8, where nothing is cached
    posterior_noise: Tensor | None  # (B, c, h, w) for them
    noise: Tensor  # (B, c, h, w)
    t: Tensor  # (B,) int64
    context: Tensor | None  # (B, L, D) float16 features of a frozen text encoder
    tokens: Tensor | None  # (B, L) int64
    context_mask: Tensor | None  # (B, L) bool
    broken: Broken


class PixelBatches(Dataset[PixelBatch]):
    """Pictures for VAE training."""

    def __init__(
        self, source: Source, config: DataConfig, plan: BatchPlan, seed: int, latent_shape: tuple[int, ...]
    ) -> None:
        self.source, self.config, self.plan, self.seed = source, config, plan, seed
        self.latent_shape = latent_shape

    def __getitem__(self, number: int) -> PixelBatch:
        step, part = divmod(number, self.plan.passes)
        broken: Broken = []
        images, noises = [], []
        for place in self.plan.places(part):
            random = draws(self.seed, "train_vae", step, place)
            index = shuffled(step * self.plan.batch_size + place, len(self.source), self.seed)
            flip = random.random() < 0.5 and self.config.flip
            images.append(_readable(self.source, index, self.config, flip, broken)[0])
            noises.append(random.standard_normal(self.latent_shape, dtype=np.float32))
        return PixelBatch(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(noises)), broken)


class LatentBatches(Dataset[LatentBatch]):
    """Latents, timesteps, noise and captions for latent training.

    Of a picture's captions one is drawn, and replaced by the empty prompt with probability `caption_dropout`. Timesteps
    are stratified over the global batch (arXiv 2107.00630, appendix I.1): place i of B draws from the i-th of B parts.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        plan: BatchPlan,
        seed: int,
        latent_shape: tuple[int, ...],
        *,
        num_timesteps: int,
        caption_dropout: float,
        latents: LatentCache | None,
        text: TextCache | TextEncoder,
    ) -> None:
        self.source, self.config, self.plan, self.seed = source, config, plan, seed
        self.latent_shape, self.num_timesteps, self.caption_dropout = latent_shape, num_timesteps, caption_dropout
        self.latents = latents
        self.features = text if isinstance(text, TextCache) else None
        self.tokenizer: Any = None if isinstance(text, TextCache) else text.tokenizer
        self.max_length = 0 if isinstance(text, TextCache) else text.max_length

    def __getitem__(self, number: int) -> LatentBatch:
        step, part = divmod(number, self.plan.passes)
        return self.collect([self._row(step, place) for place in self.plan.places(part)])

    def collect(self, rows: list[dict[str, Any]]) -> LatentBatch:
        """Rows as one micro-batch."""
        stacked: dict[str, Any] = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]
                   if name not in ("caption", "broken")}  # fmt: skip
        if self.features is None:
            ids = self.tokenizer([row["caption"] for row in rows], padding="max_length", truncation=True,
                                 max_length=self.max_length, return_tensors="pt")  # fmt: skip
            stacked |= {"tokens": ids["input_ids"], "context_mask": ids["attention_mask"].bool()}
        broken = [entry for row in rows for entry in row["broken"]]
        missing = dict.fromkeys(LatentBatch._fields)
        return LatentBatch(**{**missing, **stacked, "broken": broken})

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
        choice, drop, within = random.random(), random.random() < self.caption_dropout, random.random()
        t = int((stratum[0] + within) / stratum[1] * self.num_timesteps)
        row["t"] = np.int64(min(t, self.num_timesteps - 1))
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
            row["context"] = self.features.features(index, number)
        else:
            row["caption"] = "" if number is None else captions[number]
        return row

    def _row(self, step: int, place: int) -> dict[str, Any]:
        batch_size = self.plan.batch_size
        index = shuffled(step * batch_size + place, len(self.source), self.seed)
        return self.row(index, draws(self.seed, "train_latent", step, place), (place, batch_size))


class ValidationBatches(Dataset[LatentBatch]):
    """Held-out pictures with noise and timesteps that never change: picture i once in every band of timesteps."""

    def __init__(self, rows: LatentBatches, num_pictures: int, num_bands: int) -> None:
        self.rows = rows
        good = rows.latents.good if rows.latents is not None else np.ones(len(rows.source), dtype=bool)
        self.pictures = np.flatnonzero(good)[:num_pictures]
        self.num_bands = num_bands
        self.batch_size = rows.plan.batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.pictures) / self.batch_size) * self.num_bands

    def __getitem__(self, number: int) -> LatentBatch:
        block, band = divmod(number, self.num_bands)
        rows = []
        for index in self.pictures[block * self.batch_size : (block + 1) * self.batch_size]:
            random = draws(self.rows.seed, "validation", band, int(index))
            rows.append(self.rows.row(int(index), random, (band, self.num_bands)))
        return self.rows.collect(rows)

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
        sampler=range(start * plan.passes, stop * plan.passes),
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        timeout=600 if workers else 0,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    numbers = iter(loader)
    for _ in range(start, stop):
        yield [next(numbers) for _ in range(plan.passes)]


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
        except PictureError as error:
            broken.append((source.name(candidate), error.reason))
            reason = reason or str(error)
        else:
            return (image[:, ::-1] if flip else image), candidate
    raise LatentDiffError(f"none of the {len(source)} pictures can be used; {source.name(index)}: {reason}")
