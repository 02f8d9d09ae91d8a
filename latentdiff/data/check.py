"""A look at every picture and caption of a source before the training: what is there, and what is broken."""

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

from ..evaluation.grid import CELL, labelled_grid
from ..sections import DataConfig
from .pictures import PictureError, fit, open_picture
from .sources import Source, open_source

SHEET_PICTURES, SHEET_COLUMNS = 64, 8
NAMED_DUPLICATES = 100  # in the report
DIGEST = 16  # bytes of the hash of a picture's pixels
NO_LIMIT = 1_000_000  # what a tokenizer without a maximum length has instead is larger


@dataclass(frozen=True)
class Spread:
    """Least, middle and largest of some numbers."""

    least: float
    median: float
    largest: float

    def __str__(self) -> str:
        return f"{self.least:g} to {self.largest:g}, median {self.median:g}"


def _spread(counts: Counter[int] | Counter[float]) -> Spread | None:
    """Of numbers that occur so many times; None of no numbers."""
    return Spread(min(counts), median_high(counts.elements()), max(counts)) if counts else None


@dataclass(frozen=True)
class SplitReport:
    """One split. None stands for what there was nothing to measure of."""

    pictures: int
    broken: dict[str, int]  # reason to number
    shorter_side: Spread | None  # pixels
    aspect_ratio: Spread | None  # width over height
    captions: int
    without_caption: int  # pictures
    caption_characters: Spread | None
    caption_tokens: Spread | None
    overlong_captions: int | None

    def lines(self, name: str, max_tokens: int | None) -> Iterator[str]:
        """The report in words."""
        broken = ", ".join(f"{count} {reason}" for reason, count in self.broken.items())
        yield f"{name}: {self.pictures} pictures, of them broken: {broken or 'none'}"
        if self.shorter_side is not None:
            yield f"  shorter side {self.shorter_side} pixels; width / height {self.aspect_ratio}"
        yield f"  {self.captions} captions; {self.without_caption} pictures without one"
        if self.caption_characters is not None:
            yield f"  characters of a caption {self.caption_characters}"
        if max_tokens is None:
            yield "  lengths in tokens not checked: no tokenizer with a maximum length"
        elif self.caption_tokens is not None:
            yield f"  tokens of a caption {self.caption_tokens}; {self.overlong_captions} have more than {max_tokens}"


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
            *self.train.lines("train", self.max_tokens),
            *self.validation.lines("validation", self.max_tokens),
            f"duplicates: {self.duplicates} (same pixels, cut and resized); "
            f"{self.shared} of them are validation pictures that are in train, too",
            f"in quarantine: {self.quarantined}",
            f"written to {self.output}: report.json, contact_sheet.png, and quarantine.txt with the broken ones; "
            f"train without them with data.quarantine={self.output}/quarantine.txt",
        ]


def check_source(config: DataConfig, output: Path, tokenizer: Any = None) -> CheckReport:
    """Open every picture of both splits once, those in `config.quarantine` as well, and write down what was found.

    Writes `report.json`, `quarantine.txt` with one `name<TAB>reason` a line, and `contact_sheet.png`.

    Args:
        config: the source and what its pictures must be like.
        output: folder to write to; made if it is not there.
        tokenizer: of transformers, whose `model_max_length` captions are held against; None: not checked.

    Raises:
        LatentDiffError: the source cannot be opened.
        OSError: `output` cannot be written to.
    """
    train, validation = open_source(config.model_copy(update={"quarantine": None}))
    output.mkdir(parents=True, exist_ok=True)
    with (output / "quarantine.txt").open("w", encoding="utf-8") as quarantine:
        check = _Check(config, tokenizer, quarantine, len(train) + len(validation))
        splits = check.look_at("train", train), check.look_at("validation", validation)
    # A copy is a picture with the hash of one before.
    _, firsts, groups = np.unique(np.frombuffer(check.digests, f"S{DIGEST}"), return_index=True, return_inverse=True)
    first_of = firsts[groups]
    copies = np.flatnonzero(first_of != np.arange(len(first_of)))

    def name(place: int) -> str:
        return train.name(place) if place < len(train) else validation.name(place - len(train))

    result = CheckReport(
        source=config.source,
        image_size=config.image_size,
        max_tokens=check.max_tokens,
        train=splits[0],
        validation=splits[1],
        duplicates=len(copies),
        shared=int(np.sum((copies >= len(train)) & (first_of[copies] < len(train)))),
        duplicate_names=tuple((name(copy), name(first_of[copy])) for copy in copies[:NAMED_DUPLICATES]),
        quarantined=sum(sum(split.broken.values()) for split in splits),
        output=str(output),
    )
    (output / "report.json").write_text(json.dumps(asdict(result), indent=2, ensure_ascii=False), encoding="utf-8")
    pictures, captions = zip(*check.sheet or [(Image.new("RGB", (CELL, CELL)), "no picture can be used")], strict=True)
    labelled_grid(pictures, captions, SHEET_COLUMNS).save(output / "contact_sheet.png")
    return result


class _Check:
    """What is gathered on the way: 16 bytes a picture, and the pictures of the contact sheet."""

    def __init__(self, config: DataConfig, tokenizer: Any, quarantine: TextIO, num_pictures: int) -> None:
        limit = getattr(tokenizer, "model_max_length", None)
        self.max_tokens = int(limit) if limit is not None and limit < NO_LIMIT else None
        self.config, self.tokenizer, self.quarantine = config, tokenizer, quarantine
        self.digests = bytearray()  # of the pixels; a broken picture has its own place instead
        self.on_sheet = set(np.linspace(0, num_pictures - 1, SHEET_PICTURES).round().astype(int).tolist())
        self.sheet: list[tuple[Image.Image, str]] = []

    def look_at(self, split: str, source: Source) -> SplitReport:
        """Go through the pictures and captions of a split."""
        config, limit = self.config, self.max_tokens
        broken, aspect_ratios = Counter[str](), Counter[float]()
        captions_each, characters, tokens, shorter_sides = (Counter[int]() for _ in range(4))
        for index, captions in enumerate(tqdm(source.all_captions(), desc=split, total=len(source), unit="picture")):
            captions_each[len(captions)] += 1
            characters.update(map(len, captions))
            if limit is not None and captions:
                # verbose: otherwise the tokenizer itself complains about overlong captions.
                tokens.update(map(len, self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]))
            place = len(self.digests) // DIGEST
            digest = place.to_bytes(DIGEST, "big")
            try:
                image = open_picture(source.read(index), max_pixels=config.max_pixels, background=config.background)
                shorter_sides[min(image.size)] += 1
                aspect_ratios[round(image.width / image.height, 2)] += 1
                pixels = fit(image, config.image_size, min_size=config.min_size or config.image_size)
                digest = hashlib.blake2b(pixels.tobytes(), digest_size=DIGEST).digest()
                if place in self.on_sheet:
                    self.sheet.append((Image.fromarray(pixels).resize((CELL, CELL)), next(iter(captions), "")))
            except PictureError as error:
                broken[error.reason] += 1
                self.quarantine.write(f"{source.name(index)}\t{' '.join(str(error).split())}\n")
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
