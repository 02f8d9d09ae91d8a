"""Prompt fidelity: the training picture nearest to a sample should show the concept that was asked for.

Nearest by Euclidean distance in two feature spaces: the latents of the model's own VAE, and 32 x 32 RGB. This measures
learning, not generalization: a model that copies its training pictures scores 100 %. Look at the grid as well.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.cache import read_pixels
from ..data.sources import Source
from ..errors import LatentDiffError
from ..sampling.settings import SamplingSettings
from ..sections import DataConfig
from .figures import wilson
from .gallery import LATENTS, Gallery
from .grid import picture_grid

GRID_PICTURES, GRID_COLUMNS = 64, 8
QUERY_BATCH = 256  # queries compared with the gallery at a time


class Asked(NamedTuple):
    """The pictures to draw, one after the other."""

    prompts: list[str]
    seeds: list[int]
    concepts: list[str]
    pictures: list[int]  # in the source, whose captions the prompts are

    @classmethod
    def of(cls, source: Source, concepts: Sequence[str], chosen: Sequence[int], settings: SamplingSettings) -> Self:
        """Ask for `num_images` pictures of the caption of each chosen picture, each with its own seed."""
        sampled = [index for index in chosen for _ in range(settings.num_images)]
        prompts = [source.captions(index)[0] for index in sampled]
        return cls(prompts, settings.seeds(len(sampled)), [concepts[index] for index in sampled], sampled)


@dataclass(frozen=True)
class Agreement:
    """How often the nearest training picture shows the concept that was asked for, in one feature space."""

    features: str
    top1: float  # share of the samples
    standard_error: float  # of top1 over concepts (or prompts): the samples of one are one observation
    low: float  # of the 90 % interval of top1
    high: float
    median_rank: float  # pictures of other concepts at least as near as the nearest of the right one; 0 is best
    chance: float  # top1 of picking training pictures at random
    shuffled: float  # top1 when each sample is compared with the prompt of another

    def __str__(self) -> str:
        return f"{self.top1:.1%}, with 90 % confidence {self.low:.1%} to {self.high:.1%}"


@dataclass(frozen=True)
class ConceptReport:
    """Comparison of samples with a gallery of training pictures."""

    concepts: int
    pictures: int  # samples
    gallery: int  # training pictures
    agreements: list[Agreement]
    rows: list[dict[str, Any]]  # per sample: prompt, seed, concept, and in each feature space rank and nearest concept
    grid: Image.Image  # each sample above its nearest training picture by latents

    def lines(self) -> Iterator[str]:
        """Yield the report for a terminal, line by line."""
        yield (
            f"{self.pictures} samples of {self.concepts} training concepts; the nearest of "
            f"{self.gallery} training pictures shows the concept asked for:"
        )
        for result in self.agreements:
            yield (
                f"  by {result.features}: {result} (chance {result.chance:.2%}, "
                f"shuffled prompts {result.shuffled:.1%}; median rank {result.median_rank:g})"
            )


def concepts_of(source: Source, style: str = "") -> list[str]:
    """Return what each picture shows: its first caption without the first match of the regular expression `style`."""
    try:
        pattern = re.compile(style)
    except re.error as error:
        raise LatentDiffError(f"style {style!r}: not a valid regular expression ({error})") from None
    return [pattern.sub("", (captions or [""])[0], count=1) for captions in source.all_captions()]


def choose(concepts: Sequence[str], count: int, seed: int | Sequence[int] | None) -> list[int]:
    """Choose one random picture for each of `count` random concepts, or of all if there are fewer; returns indices."""
    random = np.random.default_rng(seed)
    names = sorted(set(concepts) - {""})
    if min(len(names), count) < 2:
        raise LatentDiffError(f"concepts: {len(names)} available, {count} requested; at least 2 are needed")
    chosen = random.permutation(len(names))[:count]
    pictures: dict[str, list[int]] = {}
    for index, concept in enumerate(concepts):
        pictures.setdefault(concept, []).append(index)
    return [int(random.choice(pictures[names[number]])) for number in chosen]


def ranks(queries: Tensor, gallery: Tensor, requested: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Return each query's rank and the gallery index of its nearest picture, both (Q,) int64.

    The rank is the number of pictures of other concepts that are at least as near as the nearest of the query's own.
    `queries` (Q, D) and `gallery` (N, D) are features, `requested` (Q,) and `shown` (N,) the indices of their concepts.
    """
    if not bool(queries.isfinite().all() and gallery.isfinite().all()):
        raise LatentDiffError("cannot compare features that are not finite")
    gallery = gallery.double()
    counts, nearest = [], []
    for start in range(0, len(queries), QUERY_BATCH):
        distances = torch.cdist(queries[start : start + QUERY_BATCH].double(), gallery)
        same = requested[start : start + QUERY_BATCH, None] == shown[None, :]
        own = distances.masked_fill(~same, torch.inf).amin(1, keepdim=True)
        counts.append(((distances <= own) & ~same).sum(1))
        nearest.append(distances.argmin(1))
    return torch.cat(counts), torch.cat(nearest)


def agreement(
    name: str,
    queries: Tensor,
    gallery: Tensor,
    requested: Sequence[str],
    shown: Sequence[str],
    prompts: Sequence[str] | None = None,
) -> tuple[Agreement, Tensor, Tensor]:
    """Measure how well samples agree with their prompts; also returns what `ranks` does.

    `queries` (Q, D) are features of the samples and `requested` their concepts; `gallery` (N, D) and `shown` are those
    of the training pictures, which show every requested concept. `prompts`, by default the concepts, say which samples
    are one observation.
    """
    ids = {concept: index for index, concept in enumerate(dict.fromkeys(shown))}
    query_ids, gallery_ids = (torch.tensor([ids[concept] for concept in names]) for names in (requested, shown))
    rank, nearest = ranks(queries, gallery, query_ids, gallery_ids)
    shuffled, _ = ranks(queries, gallery, query_ids.roll(len(query_ids) // 2), gallery_ids)  # prompts of other concepts
    right = (rank == 0).double()
    by_prompt: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts or requested):
        by_prompt.setdefault(prompt, []).append(index)
    shares = torch.stack([right[indices].mean() for indices in by_prompt.values()])
    share, error = float(right.mean()), float(shares.std() / len(shares) ** 0.5)
    low, high = wilson(share, error, len(shares))
    result = Agreement(
        features=name,
        top1=share,
        standard_error=error,
        low=low,
        high=high,
        median_rank=float(rank.double().quantile(0.5)),
        chance=float((query_ids[:, None] == gallery_ids[None, :]).double().mean()),
        shuffled=float((shuffled == 0).double().mean()),
    )
    return result, rank, nearest


def compare(
    gallery: Gallery,
    source: Source,
    data: DataConfig,
    concepts: Sequence[str],
    asked: Asked,
    images: Sequence[Image.Image],
    queries: Gallery,
) -> ConceptReport:
    """Compare drawn pictures with the gallery of all training pictures.

    `concepts` holds the concept of each picture in `source`; `queries` are features of the drawn `images`.
    """
    prompts, seeds, requested, _ = asked
    shown = [concepts[index] for index in gallery.indices]
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": seed, "concept": concept}
        for prompt, seed, concept in zip(prompts, seeds, requested, strict=True)
    ]
    agreements, neighbors = [], {}
    for name, features in gallery.features().items():
        result, ranking, nearest = agreement(name, queries.features()[name], features, requested, shown)
        agreements.append(result)
        neighbors[name] = [gallery.indices[number] for number in nearest.tolist()]
        for row, rank, index in zip(rows, ranking.tolist(), neighbors[name], strict=True):
            row[name] = {"rank": rank, "nearest": concepts[index], "picture": source.name(index)}
    sheet, texts = [], []
    for start in range(0, min(GRID_PICTURES, len(images)), GRID_COLUMNS):
        part = slice(start, start + GRID_COLUMNS)
        matches = neighbors[LATENTS][part]
        sheet.extend([images[part], [Image.fromarray(read_pixels(source, index, data)) for index in matches]])
        texts.extend([prompts[part], [f"nearest: {concepts[index]}" for index in matches]])
    grid = picture_grid(sheet, captions=texts)
    return ConceptReport(len(set(requested)), len(images), len(set(gallery.indices)), agreements, rows, grid)
