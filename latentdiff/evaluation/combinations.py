"""New combinations: known things with a known attribute, such as a style, that were never shown together.

Unlike prompt fidelity, a model cannot do this by copying its training pictures. The nearest of all pictures, held-out
ones among them, should show the thing that was asked for, and with the attribute that was asked for.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..data.cache import read_pixels
from ..data.sources import Source
from ..sections import DataConfig
from .concepts import GRID_COLUMNS, GRID_PICTURES, Agreement, Asked, agreement, concepts_of
from .gallery import Gallery
from .grid import picture_grid


@dataclass(frozen=True)
class CombinationReport:
    """How often samples of held-out captions show what was asked for."""

    combinations: int
    pictures: int  # samples
    gallery: int  # pictures to compare with
    concepts: list[Agreement]
    attributes: list[Agreement]
    rows: list[dict[str, Any]]  # per sample: prompt, seed, and in each feature space what the nearest picture shows
    grid: Image.Image  # each sample above the held-out picture with its caption

    def lines(self) -> Iterator[str]:
        """Yield the report for a terminal, line by line."""
        yield (
            f"{self.pictures} samples of {self.combinations} new combinations of known things and attributes; the "
            f"nearest of {self.gallery} pictures, held-out ones among them, shows"
        )
        for concept, attribute in zip(self.concepts, self.attributes, strict=True):
            yield f"  by {concept.features}: " + ", ".join(
                f"the {what} {each} (chance {each.chance:.2%}, shuffled prompts {each.shuffled:.1%})"
                for what, each in (("thing", concept), ("attribute", attribute))
            )


def attributes_of(source: Source, style: str) -> list[str]:
    """Return the part of each picture's first caption that the regular expression `style` matches."""
    pattern = re.compile(style)
    found = [pattern.search((captions or [""])[0]) for captions in source.all_captions()]
    return [match.group() if match else "" for match in found]


def new_combinations(train: Source, held_out: Source, style: str) -> list[int]:
    """Return the indices of held-out pictures with a known thing and attribute that no training picture combines."""
    shown = list(zip(attributes_of(train, style), concepts_of(train, style), strict=True))
    attributes, concepts = ({each[part] for each in shown} - {""} for part in (0, 1))
    asked = zip(attributes_of(held_out, style), concepts_of(held_out, style), strict=True)
    known, combined = (attributes, concepts), set(shown)
    return [
        index
        for index, pair in enumerate(asked)
        if pair[0] in known[0] and pair[1] in known[1] and pair not in combined
    ]


def compare_combinations(
    galleries: tuple[Gallery, Gallery],
    sources: tuple[Source, Source],
    data: DataConfig,
    style: str,
    requested: Asked,
    images: Sequence[Image.Image],
    drawn: Gallery,
) -> CombinationReport:
    """Compare pictures drawn of held-out captions with all pictures.

    `galleries` and `sources` are those of training and of held-out pictures; `drawn` are features of the `images`.
    """
    shown = {name: [values[index] for gallery, values in zip(galleries, each, strict=True) for index in gallery.indices]
             for name, each in (("concept", [concepts_of(source, style) for source in sources]),
                                ("attribute", [attributes_of(source, style) for source in sources]))}  # fmt: skip
    held_out, (prompts, seeds, _, sampled) = sources[1], requested
    asked = {"concept": concepts_of(held_out, style), "attribute": attributes_of(held_out, style)}
    queries = drawn.features()
    rows: list[dict[str, Any]] = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
    found: dict[str, list[Agreement]] = {"concept": [], "attribute": []}
    for name, features in galleries[0].features().items():
        everything = torch.cat([features, galleries[1].features()[name]])
        for what, results in found.items():
            wanted = [asked[what][index] for index in sampled]
            result, _, nearest = agreement(name, queries[name], everything, wanted, shown[what], prompts)
            results.append(result)
            for row, number in zip(rows, nearest.tolist(), strict=True):
                row.setdefault(name, {})[what] = shown[what][number]
    sheet, texts = [], []
    for start in range(0, min(GRID_PICTURES, len(images)), GRID_COLUMNS):
        part = slice(start, start + GRID_COLUMNS)
        real = [Image.fromarray(read_pixels(held_out, index, data)) for index in sampled[part]]
        sheet.extend([images[part], real])
        texts.extend([prompts[part], ["never shown in training"] * len(real)])
    sizes = (len(set(sampled)), len(images), len(shown["concept"]))
    return CombinationReport(*sizes, found["concept"], found["attribute"], rows, picture_grid(sheet, captions=texts))
