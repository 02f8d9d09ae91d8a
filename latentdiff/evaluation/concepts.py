"""Does a model draw what is asked? Each drawn picture's nearest training picture should show the same thing.

Two sets of features, compared by Euclidean distance: the latents of the model's own VAE, and the picture as 32 x 32
RGB. It measures learning, not invention: a model that copies its training pictures scores 1. Look at the grid as well.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.cache import read_pixels
from ..data.sources import Source
from ..errors import LatentDiffError
from ..sampling.loop import Features
from ..sampling.parts import ModelParts
from ..sampling.settings import SamplingSettings
from ..sections import DataConfig
from .gallery import LATENTS, Gallery, embed
from .grid import picture_grid

SHOWN, COLUMNS = 64, 8  # of the grid
QUERIES = 256  # compared with the gallery at a time


@dataclass(frozen=True)
class Agreement:
    """How often the nearest training picture shows the concept that was asked for."""

    features: str
    top1: float  # share of the drawn pictures
    standard_error: float  # of top1, for other concepts of this kind; the pictures of one are one observation
    median_rank: float  # pictures of other concepts at least as near as the first of the right one; 0 is best
    chance: float  # top1 of picking a training picture at random
    shuffled: float  # top1 when every picture is held against the prompt of another


@dataclass(frozen=True)
class ConceptReport:
    """How the drawn pictures compare with a gallery."""

    concepts: int
    pictures: int  # drawn
    gallery: int  # training pictures to be nearest
    agreements: list[Agreement]
    rows: list[dict[str, Any]]  # of each drawn picture: prompt, seed, and by both features rank and nearest concept
    grid: Image.Image  # drawn above its nearest training picture by latents

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield (
            f"{self.pictures} pictures of {self.concepts} training concepts; the nearest of "
            f"{self.gallery} training pictures shows the concept asked for:"
        )
        for found in self.agreements:
            yield (
                f"  by {found.features}: {found.top1:.1%} ± {found.standard_error:.1%} (chance {found.chance:.2%}, "
                f"prompts shuffled {found.shuffled:.1%}; median rank {found.median_rank:g})"
            )


def concepts_of(source: Source, style: str = "") -> list[str]:
    """What each picture shows: its first caption, without what the regular expression `style` matches first in it.

    Raises:
        LatentDiffError: not a regular expression.
    """
    try:
        pattern = re.compile(style)
    except re.error as error:
        raise LatentDiffError(f"style {style!r}: not a regular expression ({error})") from None
    return [pattern.sub("", (captions or [""])[0], count=1) for captions in source.all_captions()]


def choose(concepts: Sequence[str], count: int, seed: int | Sequence[int] | None) -> list[int]:
    """The place of one picture of each of `count` concepts, or of all where there are fewer, at random from `seed`.

    Raises:
        LatentDiffError: there are fewer than two concepts, which cannot be told apart.
    """
    random = np.random.default_rng(seed)
    names = sorted(set(concepts) - {""})
    if min(len(names), count) < 2:
        raise LatentDiffError(f"{len(names)} concepts, {count} asked for: two at least are needed to tell them apart")
    chosen = random.permutation(len(names))[:count]
    places: dict[str, list[int]] = {}
    for place, concept in enumerate(concepts):
        places.setdefault(concept, []).append(place)
    return [int(random.choice(places[names[index]])) for index in chosen]


@torch.no_grad()
def sample_concepts(
    pipe: ModelParts, captions: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
) -> list[Image.Image]:
    """Draw the captions of some training pictures, each `num_images` times, every picture with its own seed.

    Captions are taken as they are, as in training: brackets weight nothing.

    Raises:
        LatentDiffError: a setting is out of range.
    """
    wanted = pipe.text_encoder(captions).repeat_interleave(settings.num_images, 0)
    unwanted = None if settings.guidance_scale == 1 else pipe.text_encoder.null_context(len(wanted))
    return pipe.sample_images(Features(wanted, unwanted), seeds, settings)


def ranks(queries: Tensor, gallery: Tensor, asked: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """How many pictures of other concepts are at least as near to each query as the first of its own.

    Args:
        queries: (Q, D) features.
        gallery: (N, D) features.
        asked: (Q,) number of each query's concept, one that the gallery has.
        shown: (N,) number of each gallery picture's concept.

    Returns:
        The ranks, (Q,) int64, and the place in the gallery of the picture nearest to each query, (Q,) int64.

    Raises:
        LatentDiffError: features are not finite.
    """
    if not bool(queries.isfinite().all() and gallery.isfinite().all()):
        raise LatentDiffError("features that are not finite cannot be compared")
    gallery = gallery.double()
    found, nearest = [], []
    for start in range(0, len(queries), QUERIES):
        distances = torch.cdist(queries[start : start + QUERIES].double(), gallery)
        same = asked[start : start + QUERIES, None] == shown[None, :]
        own = distances.masked_fill(~same, torch.inf).amin(1, keepdim=True)
        found.append(((distances <= own) & ~same).sum(1))
        nearest.append(distances.argmin(1))
    return torch.cat(found), torch.cat(nearest)


def agreement(
    name: str, queries: Tensor, gallery: Tensor, asked: Sequence[str], shown: Sequence[str]
) -> tuple[Agreement, Tensor, Tensor]:
    """`Agreement` of drawn pictures with their prompts.

    Args:
        name: of the features.
        queries: (Q, D) features of the drawn pictures.
        gallery: (N, D) features of the training pictures.
        asked: concept of each drawn picture; the gallery has them all.
        shown: concept of each training picture.

    Returns:
        The agreement; and, as `ranks`, the rank of each drawn picture and the place of its nearest one.

    Raises:
        LatentDiffError: features are not finite.
    """
    number = {concept: index for index, concept in enumerate(dict.fromkeys(shown))}
    wanted, there = (torch.tensor([number[concept] for concept in names]) for names in (asked, shown))
    rank, nearest = ranks(queries, gallery, wanted, there)
    control, _ = ranks(queries, gallery, wanted.roll(len(wanted) // 2), there)  # the prompt of another concept
    right = (rank == 0).double()
    shares = torch.stack([right[wanted == concept].mean() for concept in set(wanted.tolist())])
    found = Agreement(
        features=name,
        top1=float(right.mean()),
        standard_error=float(shares.std() / len(shares) ** 0.5),
        median_rank=float(rank.double().quantile(0.5)),
        chance=float((wanted[:, None] == there[None, :]).double().mean()),
        shuffled=float((control == 0).double().mean()),
    )
    return found, rank, nearest


def compare(
    pipe: ModelParts,
    gallery: Gallery,
    source: Source,
    data: DataConfig,
    concepts: Sequence[str],
    chosen: Sequence[int],
    settings: SamplingSettings,
) -> ConceptReport:
    """Draw what some training pictures show, and hold it against all of them.

    Args:
        pipe: the model.
        gallery: the training pictures as it sees them.
        source: the same pictures.
        data: how they become pixels.
        concepts: what each of them shows.
        chosen: places in the source of those to draw, each `num_images` times.
        settings: how to sample.

    Raises:
        LatentDiffError: a setting is out of range, or features are not finite.
    """
    drawn = [place for place in chosen for _ in range(settings.num_images)]
    prompts, seeds = [source.captions(place)[0] for place in drawn], settings.seeds(len(drawn))
    images = sample_concepts(pipe, prompts[:: settings.num_images], seeds, settings)
    asked, shown = ([concepts[place] for place in where] for where in (drawn, gallery.places))
    queries = embed(pipe.vae, enumerate(map(np.asarray, images)), pipe.image_size).features()
    rows: list[dict[str, Any]] = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
    found, places = [], {}
    for name, there in gallery.features().items():
        result, rank, nearest = agreement(name, queries[name], there, asked, shown)
        found.append(result)
        places[name] = [gallery.places[number] for number in nearest.tolist()]
        for row, ahead, place in zip(rows, rank.tolist(), places[name], strict=True):
            row[name] = {"rank": ahead, "nearest": concepts[place], "picture": source.name(place)}
    sheet, texts = [], []
    for start in range(0, min(SHOWN, len(images)), COLUMNS):
        part = slice(start, start + COLUMNS)
        beside = places[LATENTS][part]
        sheet.extend([images[part], [Image.fromarray(read_pixels(source, place, data)) for place in beside]])
        texts.extend([prompts[part], [f"nearest: {concepts[place]}" for place in beside]])
    grid = picture_grid(sheet, captions=texts)
    return ConceptReport(len(set(asked)), len(images), len(set(gallery.places)), found, rows, grid)
