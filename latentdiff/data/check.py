"""Check of a data source before training: opens every picture, measures every caption, lists what is broken."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_high
from typing import Any, TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..evaluation.grid import CELL, labeled_grid
from ..sections import DataConfig
from .left_out import LeftOut, lines_about
from .pictures import PictureError, fit, open_picture
from .sources import Source, open_source

SHEET_PICTURES, SHEET_COLUMNS = 64, 8
NAMED_DUPLICATES = 100  # listed in the report
DIGEST = 16  # bytes per hash of a picture's pixels
NO_LIMIT = 1_000_000  # a tokenizer without a maximum length reports a larger number


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum of some numbers."""

    least: float
    median: float
    largest: float

    def __str__(self) -> str:
        return f"{self.least:g} to {self.largest:g}, median {self.median:g}"


def _spread(counts: Counter[int] | Counter[float]) -> Spread | None:
    return Spread(min(counts), median_high(counts.elements()), max(counts)) if counts else None


@dataclass(frozen=True)
class SplitReport:
    """Report on one split; None stands for a quantity with nothing to measure."""

    pictures: int
    broken: dict[str, int]  # reason -> count
    shorter_side: Spread | None  # pixels
    aspect_ratio: Spread | None  # width / height
    captions: int
    without_caption: int  # pictures
    caption_characters: Spread | None
    caption_tokens: Spread | None
    overlong_captions: int | None

    def lines(self, name: str, max_tokens: int | None) -> Iterator[str]:
        """Yield the report for a terminal, line by line."""
        broken = ", ".join(f"{count} {reason}" for reason, count in self.broken.items())
        yield f"{name}: {self.pictures} pictures, of them broken: {broken or 'none'}"
        if self.shorter_side is not None:
            yield f"  shorter side {self.shorter_side} pixels; aspect ratio (width / height) {self.aspect_ratio}"
        yield f"  {self.captions} captions; pictures without one: {self.without_caption}"
        if self.caption_characters is not None:
            yield f"  characters per caption: {self.caption_characters}"
        if max_tokens is None:
            yield "  tokens per caption: not checked, as there is no tokenizer with a maximum length"
        elif self.caption_tokens is not None:
            yield f"  tokens per caption: {self.caption_tokens}; {self.overlong_captions} have more than {max_tokens}"


@dataclass(frozen=True)
class CheckReport:
    """Report on both splits and on what they share."""

    source: str
    image_size: int
    max_tokens: int | None  # limit per caption; None: not checked
    max_broken: float  # share of the training pictures that may be broken
    train: SplitReport
    validation: SplitReport
    duplicates: int  # pictures with the same pixels as an earlier one, after cropping and resizing
    shared: int  # of those, validation pictures whose original is in train
    duplicate_names: tuple[tuple[str, str], ...]  # (duplicate, original), the first NAMED_DUPLICATES
    quarantined: int
    left_out: dict[str, list[str]]  # names of what is not used, by reason
    remarks: dict[str, list[str]]
    output: str

    def lines(self) -> list[str]:
        """Return the report for a terminal."""
        return [
            f"{self.source}, at {self.image_size} x {self.image_size} pixels",
            *self.train.lines("train", self.max_tokens),
            *self.validation.lines("validation", self.max_tokens),
            f"duplicates: {self.duplicates} (same pixels after cropping and resizing); "
            f"{self.shared} of them are validation pictures that are also in train",
            *lines_about(self.left_out, self.remarks),
            f"quarantined: {self.quarantined}",
            f"written to {self.output}: report.json (all names), contact_sheet.png, quarantine.txt (broken pictures)",
            *self._advice(),
        ]

    def _advice(self) -> Iterator[str]:
        if self.quarantined:
            broken, total = sum(self.train.broken.values()), self.train.pictures
            stops = broken > self.max_broken * total
            yield (f"training {'stops' if stops else 'goes on without them'}, as {broken} of {total} pictures are "
                   f"broken and data.max_broken={self.max_broken:g}; to leave them out beforehand, set "
                   f"data.quarantine={self.output}/quarantine.txt")  # fmt: skip


def check_source(config: DataConfig, output: Path, tokenizer: Any = None) -> CheckReport:
    """Open every picture of both splits once, including those in `config.quarantine`, and report what was found.

    Writes `report.json`, `quarantine.txt` with one `name<TAB>reason` per line, and `contact_sheet.png`.

    Args:
        config: the source and the requirements on its pictures.
        output: folder to write to; created if missing.
        tokenizer: a transformers tokenizer; captions beyond its `model_max_length` are counted. None: not checked.

    Raises:
        LatentDiffError: the source cannot be opened.
        OSError: `output` cannot be written.
    """
    left_out = LeftOut()
    train, validation = open_source(config.model_copy(update={"quarantine": None}), left_out)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "quarantine.txt").open("w", encoding="utf-8") as quarantine:
        scan = _Scan(config, tokenizer, quarantine, left_out, len(train) + len(validation))
        splits = scan.split("train", train), scan.split("validation", validation)
    # A duplicate has the hash of an earlier picture.
    _, firsts, groups = np.unique(np.frombuffer(scan.digests, f"S{DIGEST}"), return_index=True, return_inverse=True)
    first_of = firsts[groups]
    duplicates = np.flatnonzero(first_of != np.arange(len(first_of)))

    def name(index: int) -> str:
        return train.name(index) if index < len(train) else validation.name(index - len(train))

    result = CheckReport(
        source=config.source,
        image_size=config.image_size,
        max_tokens=scan.max_tokens,
        max_broken=config.max_broken,
        train=splits[0],
        validation=splits[1],
        duplicates=len(duplicates),
        shared=int(np.sum((duplicates >= len(train)) & (first_of[duplicates] < len(train)))),
        duplicate_names=tuple((name(index), name(first_of[index])) for index in duplicates[:NAMED_DUPLICATES]),
        quarantined=sum(sum(split.broken.values()) for split in splits),
        left_out=left_out.names,
        remarks=left_out.remarks,
        output=str(output),
    )
    (output / "report.json").write_text(json.dumps(asdict(result), indent=2, ensure_ascii=False), encoding="utf-8")
    pictures, captions = zip(*scan.sheet or [(Image.new("RGB", (CELL, CELL)), "no usable picture")], strict=True)
    labeled_grid(pictures, captions, SHEET_COLUMNS).save(output / "contact_sheet.png")
    return result


class _Scan:
    """State of a check over both splits: a 16-byte hash per picture, and the contact sheet."""

    def __init__(
        self, config: DataConfig, tokenizer: Any, quarantine: TextIO, left_out: LeftOut, num_pictures: int
    ) -> None:
        limit = getattr(tokenizer, "model_max_length", None)
        self.max_tokens = int(limit) if limit is not None and limit < NO_LIMIT else None
        self.config, self.tokenizer, self.quarantine, self.left_out = config, tokenizer, quarantine, left_out
        self.digests = bytearray()  # pixel hashes; a broken picture has its unique index instead
        self.sheet_indices = set(np.linspace(0, num_pictures - 1, SHEET_PICTURES).round().astype(int).tolist())
        self.sheet: list[tuple[Image.Image, str]] = []

    def split(self, name: str, source: Source) -> SplitReport:
        """Check the pictures and captions of a split."""
        config, limit = self.config, self.max_tokens
        broken, aspect_ratios = Counter[str](), Counter[float]()
        captions_each, characters, tokens, shorter_sides = (Counter[int]() for _ in range(4))
        for row, captions in enumerate(tqdm(source.all_captions(), desc=name, total=len(source), unit="picture")):
            captions_each[len(captions)] += 1
            characters.update(map(len, captions))
            if not captions:
                self.left_out.remark(f"{name} pictures without a caption", [source.name(row)])
            elif limit is not None:
                # verbose=False: otherwise the tokenizer warns about overlong captions itself.
                lengths = [len(ids) for ids in self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]]
                tokens.update(lengths)
                if max(lengths) > limit:
                    self.left_out.remark(f"{name} pictures with captions that are cut off", [source.name(row)])
            index = len(self.digests) // DIGEST
            digest = index.to_bytes(DIGEST, "big")
            try:
                image = open_picture(source.read(row), max_pixels=config.max_pixels, background=config.background)
                shorter_sides[min(image.size)] += 1
                aspect_ratios[round(image.width / image.height, 2)] += 1
                pixels = fit(image, config.image_size, min_size=config.min_size or config.image_size)
                digest = hashlib.blake2b(pixels.tobytes(), digest_size=DIGEST).digest()
                if index in self.sheet_indices:
                    self.sheet.append((Image.fromarray(pixels).resize((CELL, CELL)), next(iter(captions), "")))
            except PictureError as error:
                broken[error.reason] += 1
                self.quarantine.write(f"{source.name(row)}\t{' '.join(str(error).split())}\n")
            self.digests += digest
        return SplitReport(
            pictures=len(source),
            broken=dict(sorted(broken.items())),
            shorter_side=_spread(shorter_sides),
            aspect_ratio=_spread(aspect_ratios),
            captions=characters.total(),
            without_caption=captions_each[0],
            caption_characters=_spread(characters),
            caption_tokens=_spread(tokens),
            overlong_captions=None if limit is None else sum(n for length, n in tokens.items() if length > limit),
        )
