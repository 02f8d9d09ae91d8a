"""Does a model draw what is asked? Each drawn picture's nearest training picture should show the same thing.

Two sets of features, compared by Euclidean distance: the latents of the model's own VAE, and the picture as 32 x 32
RGB. It measures learning, not invention: a model that copies its training pictures scores 1. Look at the grid as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.cache import read_pixels, to_pixels
from ..data.sources import Source
from ..errors import LatentDiffError
from ..sections import DataConfig
from .grid import picture_grid

if TYPE_CHECKING:
    from ..pipeline import LatentPipeline

BATCH = 64  # pictures embedded at a time
THUMBNAIL = 32  # pixels a side
LATENTS, RGB = "latents", f"{THUMBNAIL}x{THUMBNAIL} RGB"
SHOWN, COLUMNS = 64, 8  # of the grid


@dataclass(frozen=True)
class Agreement:
    """How often the nearest training picture shows the concept that was asked for."""

    features: str
    top1: float  # share of the drawn pictures
    median_rank: float  # pictures of other concepts nearer than the first of the right one; 0 is best
    chance: float  # top1 of picking a training picture at random
    shuffled: float  # top1 when every picture is held against the prompt of another


@dataclass(frozen=True)
class ConceptReport:
    """What `draw_concepts` found."""

    agreements: tuple[Agreement, ...]
    num_concepts: int
    num_pictures: int  # drawn
    num_gallery: int  # training pictures to be nearest
    settings: dict[str, Any]
    grid: Image.Image  # drawn above its nearest training picture by latents

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield (
            f"{self.num_pictures} pictures of {self.num_concepts} training concepts; the nearest of "
            f"{self.num_gallery} training pictures shows the concept asked for:"
        )
        for found in self.agreements:
            yield (
                f"  by {found.features}: {found.top1:.1%} (chance {found.chance:.2%}, prompts shuffled "
                f"{found.shuffled:.1%}; median rank {found.median_rank:g})"
            )

    def facts(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "concepts": self.num_concepts,
            "pictures": self.num_pictures,
            "gallery": self.num_gallery,
            "settings": self.settings,
            "agreements": [asdict(found) for found in self.agreements],
        }


def ranks(queries: Tensor, gallery: Tensor, same: Tensor) -> Tensor:
    """How many gallery pictures of other concepts are nearer to each query than the first of its own, (Q,) int64.

    Args:
        queries: (Q, D) features.
        gallery: (N, D) features.
        same: (Q, N) bool, True where both show the same concept; one True a row at least.
    """
    distances = torch.cdist(queries.double(), gallery.double())
    own = distances.masked_fill(~same, torch.inf).amin(1, keepdim=True)
    return ((distances < own) & ~same).sum(1)


def agreement(name: str, queries: Tensor, gallery: Tensor, asked: Sequence[str], shown: Sequence[str]) -> Agreement:
    """`Agreement` of drawn pictures with their prompts.

    Args:
        name: of the features.
        queries: (Q, D) features of the drawn pictures.
        gallery: (N, D) features of the training pictures.
        asked: concept of each drawn picture.
        shown: concept of each training picture.
    """
    same = torch.tensor(np.array(asked)[:, None] == np.array(shown)[None, :])
    place = ranks(queries, gallery, same)
    others = [(index + len(asked) // 2) % len(asked) for index in range(len(asked))]  # of another concept, each once
    control = ranks(queries, gallery, same[others])
    return Agreement(
        features=name,
        top1=float((place == 0).double().mean()),
        median_rank=float(place.double().quantile(0.5)),
        chance=float(same.double().mean()),
        shuffled=float((control == 0).double().mean()),
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


def choose(concepts: Sequence[str], count: int, seed: int) -> list[int]:
    """A training picture of each of `count` concepts, both drawn at random from `seed`."""
    random = np.random.default_rng(seed)
    names = sorted(set(concepts) - {""})
    chosen = random.permutation(len(names))[:count]
    places: dict[str, list[int]] = {}
    for place, concept in enumerate(concepts):
        places.setdefault(concept, []).append(place)
    return [int(random.choice(places[names[index]])) for index in chosen]


def draw_concepts(
    pipe: LatentPipeline,
    source: Source,
    data: DataConfig,
    concepts: Sequence[str],
    *,
    num_concepts: int = 64,
    num_images: int = 2,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> ConceptReport:
    """Draw the captions of some training concepts, and find the nearest training pictures.

    Args:
        pipe: the model.
        source: its training pictures, all of which are the gallery.
        data: how they become pixels, at the model's size.
        concepts: what each shows, from `concepts_of`.
        num_concepts: drawn at random from `seed`; the prompt is the caption of a picture of each, drawn likewise.
        num_images: pictures a prompt, with seeds 0, 1, ...
        seed: of the choice.
        say: told what is going on.
        options: as in a call of the pipeline.

    Raises:
        LatentDiffError: fewer than two concepts, or a setting is out of range.
    """
    chosen = choose(concepts, num_concepts, seed)
    if len(chosen) < 2:
        raise LatentDiffError(f"{len(chosen)} concepts: two at least are needed to tell them apart")
    prompts = [source.captions(place)[0] for place in chosen]
    say(f"drawing {len(prompts) * num_images} pictures")
    seeds = [number for _ in prompts for number in range(num_images)]
    images = pipe(prompts, num_images=num_images, seed=seeds, **options)
    drawn = _features(pipe, (np.asarray(image) for image in images))
    say(f"embedding {len(source)} training pictures")
    gallery = _features(pipe, (read_pixels(source, place, data) for place in range(len(source))))
    asked = [concepts[place] for place in chosen for _ in range(num_images)]
    found = tuple(agreement(name, drawn[name], gallery[name], asked, concepts) for name in drawn)
    nearest = torch.cdist(drawn[LATENTS], gallery[LATENTS]).argmin(1).tolist()
    captions = [caption for caption in prompts for _ in range(num_images)]
    beside = [Image.fromarray(read_pixels(source, place, data)) for place in nearest[:SHOWN]]
    return ConceptReport(found, len(chosen), len(images), len(source), {"seed": seed, **options},
                         _grid(images[:SHOWN], captions, beside, [concepts[place] for place in nearest]))  # fmt: skip


def _grid(images: list[Image.Image], asked: list[str], nearest: list[Image.Image], shown: list[str]) -> Image.Image:
    rows: list[list[Image.Image]] = []
    captions: list[list[str]] = []
    for start in range(0, len(images), COLUMNS):
        part = slice(start, start + COLUMNS)
        rows += [images[part], nearest[part]]
        captions += [asked[part], [f"nearest: {text}" for text in shown[part][: len(nearest[part])]]]
    return picture_grid(rows, captions=captions)


@torch.no_grad()
def _features(pipe: LatentPipeline, pictures: Iterator[Any]) -> dict[str, Tensor]:
    """Latents of the VAE, and 32 x 32 RGB, of uint8 pictures (H, W, 3): (N, D) each."""
    latents, thumbnails = [], []
    weights = next(pipe.vae.parameters())
    for batch in _batched(pictures, BATCH):
        pixels = to_pixels(torch.from_numpy(np.stack(batch)))
        latents.append(pipe.vae.encode(pixels.to(weights)).float().flatten(1).cpu())
        thumbnails.append(F.interpolate(pixels, size=(THUMBNAIL, THUMBNAIL), mode="area").flatten(1))
    return {LATENTS: torch.cat(latents), RGB: torch.cat(thumbnails)}


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
