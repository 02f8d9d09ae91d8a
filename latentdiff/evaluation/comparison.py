"""What a model draws, and what another one draws of the same prompts and seeds, against the training pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.cache import read_pixels
from ..data.sources import Source
from ..sections import DataConfig
from .concepts import GRID_COLUMNS, GRID_PICTURES, ConceptReport
from .copies import Nearest, find_nearest, merge_duplicates
from .figures import LEVEL, Figure, difference
from .gallery import Gallery
from .grid import picture_grid
from .networks import FeatureNetwork
from .quality import PictureSet, clip_scores, mean_figures, set_figures

COPIED = "share of copies"


@dataclass(frozen=True)
class QualityReport:
    """Figures of the drawn pictures with their intervals, and how they differ from another model's."""

    drawn: str  # how many pictures, of how many prompts, with which settings
    figures: list[Figure]
    left_out: list[str]  # figures that are not there, and why
    held_out_copies: Figure  # the share of copies among held-out pictures, which are none
    other: str | None  # the other model
    others: list[Figure]  # its figures, in the same order
    differences: list[Figure]
    grid: Image.Image  # those most like a training picture, each above that

    def lines(self) -> Iterator[str]:
        """Yield the report for a terminal, line by line."""
        yield f"{self.drawn}; in parentheses {LEVEL:.0%} intervals:"
        for number, figure in enumerate(self.figures):
            line = f"  {figure.name}: {figure}, {figure.drawn} drawn against {figure.real} training pictures"
            if figure.name == COPIED:
                line += f"; of {self.held_out_copies.drawn} held-out pictures {self.held_out_copies}"
            if self.other is not None:
                line += f"; {self.other} {self.others[number]}, difference {self.differences[number]}"
            yield line
        for reason in self.left_out:
            yield f"  {reason}"

    def record(self) -> dict[str, Any]:
        """Return the report for a JSON file."""
        lists = {name: [each.record() for each in getattr(self, name)] for name in ("figures", "others", "differences")}
        return {"drawn": self.drawn, **lists, "other": self.other, "left_out": self.left_out,
                "held_out_copies": self.held_out_copies.record()}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """The training pictures that drawn ones are compared with."""

    source: Source
    data: DataConfig
    concepts: Sequence[str]  # of each picture in the source
    gallery: Gallery
    same: float  # root mean squared difference up to which latents are of near-duplicates
    network: FeatureNetwork | None
    seed: int

    @cached_property
    def groups(self) -> Tensor:
        """Number of each picture of the gallery, the same for near-duplicates."""
        return merge_duplicates(self.gallery.latents, self.gallery.indices, self.same)

    @cached_property
    def pictures(self) -> PictureSet:
        """Each training picture once; if mirrored ones count as training pictures too, which it is is random."""
        order = np.random.default_rng(self.seed).permutation(len(self.gallery.indices))
        rows = sorted({self.gallery.indices[row]: row for row in order.tolist()}.values())
        indices = [self.gallery.indices[row] for row in rows]
        captions = [(self.source.captions(index) or [""])[0] for index in indices]
        return picture_set({name: features[rows] for name, features in self.gallery.pooled().items()}, captions,
                           [self.concepts[index] for index in indices])  # fmt: skip

    def nearest(self, latents: Tensor) -> Nearest:
        """Find the nearest training picture of each of some latents."""
        return find_nearest(latents, self.gallery.latents, self.groups)

    def measure(self, drawn: Gallery, report: ConceptReport) -> tuple[list[Figure], list[str], Nearest]:
        """Return the figures of drawn pictures, those that are left out and why, and the nearest training pictures."""
        prompts, requested = ([row[what] for row in report.rows] for what in ("prompt", "concept"))
        found, nearest = picture_set(drawn.pooled(), prompts, requested), self.nearest(drawn.latents)
        values = {f"share of right concepts by {each.features}": _right(report, each.features)
                  for each in report.agreements}  # fmt: skip
        values[COPIED] = nearest.copied
        if self.network is not None and self.network.tokenizer is not None:
            values |= clip_scores(self.network, drawn.network[self.network.name], prompts)
        figures = mean_figures(values, found.concepts, len(self.pictures), self.seed)
        more, left_out = set_figures(self.pictures, found, self.seed, clip=_clip(self.network))
        return figures + more, left_out, nearest

    def report(
        self, drawn: Gallery, images: Sequence[Image.Image], found: ConceptReport, held_out: Gallery, what: str,
        other: tuple[str, Gallery, ConceptReport] | None,
    ) -> QualityReport:  # fmt: skip
        """Measure drawn pictures, and those of another model: its name, features and prompt fidelity."""
        figures, left_out, nearest = self.measure(drawn, found)
        copied = self.nearest(held_out.latents).copied
        (control,) = mean_figures({COPIED: copied}, range(len(copied)), len(self.pictures), self.seed)
        others = [] if other is None else self.measure(other[1], other[2])[0]
        differences = [difference(*each) for each in zip(figures, others, strict=True)] if others else []
        grid = self.pairs(images, nearest, [row["prompt"] for row in found.rows])
        return QualityReport(what, figures, left_out, control, other and other[0], others, differences, grid)

    def pairs(self, images: Sequence[Image.Image], nearest: Nearest, prompts: Sequence[str]) -> Image.Image:
        """Show the drawn pictures that are most like a training picture, each above that."""
        order = nearest.ratio.argsort()[:GRID_PICTURES].tolist()
        sheet: list[list[Image.Image]] = []
        texts: list[list[str]] = []
        for start in range(0, len(order), GRID_COLUMNS):
            part = order[start : start + GRID_COLUMNS]
            rows = [self.gallery.indices[int(nearest.rows[number])] for number in part]
            sheet += [[images[number] for number in part],
                      [Image.fromarray(read_pixels(self.source, index, self.data)) for index in rows]]  # fmt: skip
            verdicts = [f"{'copy' if nearest.copied[number] else 'no copy'} ({nearest.ratio[number]:.2f})"
                        for number in part]  # fmt: skip
            captions = [(self.source.captions(index) or [""])[0] for index in rows]
            texts += [
                [prompts[number] for number in part],
                [": ".join(each) for each in zip(verdicts, captions, strict=True)],
            ]
        return picture_grid(sheet, captions=texts)


def picture_set(features: dict[str, Tensor], captions: Sequence[str], concepts: Sequence[str]) -> PictureSet:
    """Return a set of pictures; one without a caption, or without a concept, shares it with no other."""
    return PictureSet(features, *([text or object() for text in texts] for texts in (captions, concepts)))


def reconstruction_figures(
    gallery: Gallery, concepts: Sequence[str], network: FeatureNetwork | None
) -> tuple[list[Figure], list[str]]:
    """Compare the VAE's reconstructions with the originals, which `concepts` are of."""
    rows = range(len(gallery.indices))  # a picture and its reconstruction have the same number
    original = PictureSet(gallery.pooled(), rows, picture_set({}, concepts, concepts).concepts)
    again = PictureSet(gallery.reconstructed, rows, original.concepts)
    return set_figures(original, again, 0, clip=_clip(network), manifold=False)


def _right(report: ConceptReport, features: str) -> Tensor:
    return torch.tensor([float(row[features]["rank"] == 0) for row in report.rows])


def _clip(network: FeatureNetwork | None) -> str:
    """Return the name of the features that are CLIP's."""
    return network.name if network is not None and network.clip else ""
