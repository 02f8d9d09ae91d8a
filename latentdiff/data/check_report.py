"""What `latentdiff data check` found, as numbers and as lines to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Least, middle and largest of some numbers."""

    least: float
    median: float
    largest: float

    def __str__(self) -> str:
        return f"{self.least:g} to {self.largest:g}, median {self.median:g}"


@dataclass(frozen=True)
class SplitReport:
    """One split. None stands for what there was nothing to measure of."""

    pictures: int
    broken: dict[str, int]  # reason to number
    shorter_side: Spread | None  # pixels
    aspect_ratio: Spread | None  # width over height
    captions: int
    without_caption: int  # pictures
    caption_letters: Spread | None
    caption_tokens: Spread | None
    overlong_captions: int | None


@dataclass(frozen=True)
class CheckReport:
    """Both splits, and what they share."""

    source: str
    image_size: int
    max_tokens: int | None  # of a caption; None: not checked
    train: SplitReport
    validation: SplitReport
    duplicates: int  # pictures whose pixels, cut and resized, are exactly those of one before
    shared: int  # validation pictures among them whose first is in training
    duplicate_names: tuple[tuple[str, str], ...]  # the first of them: name, and name of the one before
    quarantined: int
    output: str

    def lines(self) -> list[str]:
        """The report in words."""
        return [
            f"{self.source}, at {self.image_size} x {self.image_size} pixels",
            *_split_lines("train", self.train, self.max_tokens),
            *_split_lines("validation", self.validation, self.max_tokens),
            f"duplicates: {self.duplicates} (same pixels, cut and resized); "
            f"{self.shared} of them are validation pictures that are in train, too",
            f"in quarantine: {self.quarantined}",
            f"written to {self.output}: report.json, contact_sheet.png, and quarantine.txt with the broken ones; "
            f"train without them with data.quarantine={self.output}/quarantine.txt",
        ]


def spread(counts: Counter[int] | Counter[float]) -> Spread | None:
    """Spread of numbers that occur so many times; None of no numbers."""
    total = sum(counts.values())
    if not total:
        return None
    numbers = sorted(counts)
    return Spread(numbers[0], _at(counts, numbers, total // 2), numbers[-1])


def _at(counts: Counter[int] | Counter[float], numbers: list[int] | list[float], place: int) -> float:
    """The number at a place in the sorted list of all of them."""
    for number in numbers:
        place -= counts[number]  # type: ignore[index]
        if place < 0:
            return number
    raise IndexError(place)


def _split_lines(name: str, split: SplitReport, max_tokens: int | None) -> Iterator[str]:
    broken = ", ".join(f"{count} {reason}" for reason, count in split.broken.items())
    yield f"{name}: {split.pictures} pictures, of them broken: {broken or 'none'}"
    if split.shorter_side is not None:
        yield f"  shorter side {split.shorter_side} pixels; width / height {split.aspect_ratio}"
    yield f"  {split.captions} captions; {split.without_caption} pictures without one"
    if split.caption_letters is not None:
        yield f"  letters of a caption {split.caption_letters}"
    if max_tokens is None:
        yield "  lengths in tokens not checked: no tokenizer with a maximum length"
    elif split.caption_tokens is not None:
        yield f"  tokens of a caption {split.caption_tokens}; {split.overlong_captions} have more than {max_tokens}"
