"""A look at every picture and caption of a source before the training: what is there, and what is broken."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from .check_report import CheckReport, SplitReport, spread
from .contact_sheet import contact_sheet
from .pictures import PictureError, fit, open_picture
from .sources import Source, open_source

if TYPE_CHECKING:
    from ..sections import DataConfig

__all__ = ["check_source", "CheckReport"]

SHEET_PICTURES = 64
NAMED_DUPLICATES = 100  # in the report; the quarantine has all of them, where it is asked for
DIGEST = 16  # bytes of the hash of a picture's pixels
NO_LIMIT = 1_000_000  # what a tokenizer without a maximum length has instead is larger


def check_source(
    config: DataConfig,
    output: Path,
    tokenizer: Any = None,
    report: Callable[[str], object] | None = None,
    *,
    drop_duplicates: bool = False,
) -> CheckReport:
    """Open every picture of both splits once, those in `config.quarantine` as well, and write down what was found.

    Writes `report.json`, `quarantine.txt` with one `name<TAB>reason` a line, and `contact_sheet.png`.

    Args:
        config: the source and what its pictures must be like.
        output: folder to write to; made if it is not there.
        tokenizer: of transformers, whose `model_max_length` captions are held against; None: not checked.
        report: gets the lines of the report, for example `print`.
        drop_duplicates: put copies of a picture into the quarantine, too, all but the first.

    Raises:
        LatentDiffError: the source cannot be opened.
        OSError: `output` cannot be written to.
    """
    train, validation = open_source(config.model_copy(update={"quarantine": None}))
    output.mkdir(parents=True, exist_ok=True)
    with (output / "quarantine.txt").open("w", encoding="utf-8") as quarantine:
        check = _Check(config, tokenizer, quarantine, len(train) + len(validation))
        splits = [check.look_at(name, source) for name, source in (("train", train), ("validation", validation))]
        copies = list(_copies(check.digests))
        if drop_duplicates:
            for copy, first in copies:
                check.put_away(_name(copy, train, validation), f"duplicate of {_name(first, train, validation)}")
    result = CheckReport(
        source=config.source,
        image_size=config.image_size,
        max_tokens=check.max_tokens,
        train=splits[0],
        validation=splits[1],
        duplicates=len(copies),
        shared=sum(first < len(train) <= copy for copy, first in copies),
        duplicate_names=tuple(
            (_name(copy, train, validation), _name(first, train, validation))
            for copy, first in copies[:NAMED_DUPLICATES]
        ),
        quarantined=check.quarantined,
        output=str(output),
    )
    (output / "report.json").write_text(json.dumps(asdict(result), indent=2, ensure_ascii=False), encoding="utf-8")
    contact_sheet(check.sheet).save(output / "contact_sheet.png")
    if report is not None:
        for line in result.lines():
            report(line)
    return result


class _Check:
    """What is gathered on the way: 16 bytes a picture, and the pictures of the contact sheet."""

    def __init__(self, config: DataConfig, tokenizer: Any, quarantine: TextIO, pictures: int) -> None:
        limit = getattr(tokenizer, "model_max_length", None)
        self.max_tokens = int(limit) if limit is not None and limit < NO_LIMIT else None
        self.config, self.tokenizer, self.quarantine = config, tokenizer, quarantine
        self.digests = bytearray()
        self.sheet: list[tuple[Image.Image, str]] = []
        self.on_sheet = set(np.linspace(0, pictures - 1, min(SHEET_PICTURES, pictures)).round().astype(int).tolist())
        self.quarantined = 0

    def look_at(self, split: str, source: Source) -> SplitReport:
        """Go through the pictures and captions of a split."""
        tally = _Tally()
        progress = tqdm(source.all_captions(), desc=split, total=len(source), unit="picture")
        for index, captions in enumerate(progress):
            tally.add_captions(captions, self._token_counts(captions))
            place = len(self.digests) // DIGEST
            digest = bytes(DIGEST)  # of a broken picture
            try:
                pixels = self._pixels(source.read(index), tally)
                digest = hashlib.sha256(pixels.tobytes()).digest()[:DIGEST]
                if place in self.on_sheet:
                    self.sheet.append((Image.fromarray(pixels).resize((128, 128)), next(iter(captions), "")))
            except PictureError as error:
                tally.broken[error.reason] += 1
                self.put_away(source.name(index), str(error))
            self.digests += digest
        return tally.report(self.max_tokens)

    def put_away(self, name: str, reason: str) -> None:
        """Write a picture into the quarantine."""
        self.quarantine.write(f"{name}\t{' '.join(reason.split())}\n")
        self.quarantined += 1

    def _pixels(self, data: bytes, tally: _Tally) -> np.ndarray[Any, np.dtype[np.uint8]]:
        config = self.config
        image = open_picture(data, max_pixels=config.max_pixels, background=config.background)
        tally.add_size(*image.size)
        return fit(image, config.image_size, min_size=config.min_size or config.image_size)

    def _token_counts(self, captions: list[str]) -> list[int]:
        if self.max_tokens is None or not captions:
            return []
        # verbose: otherwise the tokenizer itself complains about overlong captions.
        return [len(ids) for ids in self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]]


class _Tally:
    """Counts of one split, which stay small however many pictures there are."""

    def __init__(self) -> None:
        self.shorter_sides: Counter[int] = Counter()
        self.aspect_ratios: Counter[float] = Counter()
        self.captions_each: Counter[int] = Counter()
        self.letters: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        self.broken: Counter[str] = Counter()

    def add_captions(self, captions: list[str], token_counts: list[int]) -> None:
        """Note the captions of a picture."""
        self.captions_each[len(captions)] += 1
        self.letters.update(map(len, captions))
        self.tokens.update(token_counts)

    def add_size(self, width: int, height: int) -> None:
        """Note the size of a picture that could be opened."""
        self.shorter_sides[min(width, height)] += 1
        self.aspect_ratios[round(width / height, 2)] += 1

    def report(self, max_tokens: int | None) -> SplitReport:
        """The counts as a report."""
        checked = max_tokens is not None
        return SplitReport(
            pictures=self.captions_each.total(),
            broken=dict(sorted(self.broken.items())),
            shorter_side=spread(self.shorter_sides),
            aspect_ratio=spread(self.aspect_ratios),
            captions=self.letters.total(),
            without_caption=self.captions_each[0],
            caption_letters=spread(self.letters),
            caption_tokens=spread(self.tokens) if checked else None,
            overlong_captions=sum(n for length, n in self.tokens.items() if length > (max_tokens or 0))
            if checked
            else None,
        )


def _copies(digests: bytearray) -> Iterator[tuple[int, int]]:
    """(Place, place of the first of them) of every picture whose digest occurred before."""
    keys = np.frombuffer(bytes(digests), dtype=[("high", ">u8"), ("low", ">u8")])
    _, firsts, groups = np.unique(keys, return_index=True, return_inverse=True)
    first_of = firsts[groups]
    sound = (keys["high"] != 0) | (keys["low"] != 0)
    for copy in np.flatnonzero((first_of != np.arange(len(keys))) & sound):
        yield int(copy), int(first_of[copy])


def _name(place: int, train: Source, validation: Source) -> str:
    """Name of a picture from its place in both splits."""
    return train.name(place) if place < len(train) else validation.name(place - len(train))
