"""WebDataset shards: tar files in which neighbouring members with the same stem are one sample.

The members are indexed once, by their place in the file, and nothing is ever unpacked. A damaged shard gives the
samples before the damage; what is lost is counted in a row of its own and said every time the shard is opened.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from datasets import Dataset, Features, List, Value  # type: ignore[import-untyped]

from ..errors import LatentDiffError
from .captions import CAPTION_NAMES, clean
from .readers import Rows, TarReader
from .stamps import stamp_of

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_TEXT = 1 << 20  # bytes of a caption file
BLOCK = 512
FEATURES = Features(
    {
        "shard": Value("string"),
        "name": Value("string"),
        "offset": Value("int64"),
        "size": Value("int64"),
        "captions": List(Value("string")),
        "problem": Value("string"),
    }
)
Row = dict[str, Any]

logger = logging.getLogger(__name__)


class _DamagedError(Exception):
    """The rest of the shard cannot be read."""


def open_tars(root: Path, shards: Sequence[Path], caption_names: Sequence[str]) -> Rows:
    """The samples of some shards, in order.

    Args:
        root: folder that the names of the shards are relative to.
        shards: uncompressed tar files below it.
        caption_names: extensions and keys of JSON files that hold captions; empty for the usual ones.

    Raises:
        LatentDiffError: none of them holds a picture.
    """
    names = [shard.relative_to(root).as_posix() for shard in shards]
    stamp = stamp_of(root, shards)
    table = Dataset.from_generator(
        _rows,
        features=FEATURES,
        gen_kwargs={
            "root": str(root),
            "names": tuple(names),
            "wanted": tuple(caption_names) or CAPTION_NAMES,
            "stamp": stamp,
        },
    )
    problems = table.select_columns(["problem"])[:]["problem"]
    for index in (index for index, problem in enumerate(problems) if problem):
        logger.warning("%s: %s", root / table[index]["shard"], problems[index])
    indices = np.flatnonzero([not problem for problem in problems]).astype(np.int64)
    if not len(indices):
        raise LatentDiffError(f"{root}: no pictures in {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
    return Rows(table, TarReader(root), ("captions",), stamp, indices)


def _rows(root: str, names: Sequence[str], wanted: Sequence[str], stamp: str) -> Iterator[Row]:
    """Rows of the table; `stamp` only makes a table of changed shards another one in the cache of datasets."""
    for name in names:
        yield from index_shard(Path(root) / name, name, wanted)


def index_shard(path: Path, shard: str, wanted: Sequence[str]) -> Iterator[Row]:
    """One row a sample, then one with `problem` set if anything was left out."""
    index = _Index(shard, wanted)
    problems = []
    try:
        with path.open("rb") as file:
            for member in _members(file):
                index.add(member, file)
    except (_DamagedError, OSError) as error:
        problems.append(f"damaged, and read up to there ({error})")
    yield from index.rows(damaged=bool(problems))
    if not index.samples:
        problems.append("no samples in it")
    problems += [f"left out {count} {what}" for what, count in sorted(index.left_out.items())]
    if problems:
        problem = "; ".join(problems)
        yield {"shard": shard, "name": "", "offset": 0, "size": 0, "captions": [], "problem": problem}


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Members that are there to the last byte.

    Raises:
        _DamagedError: the file ends within a member or without an end mark, or has a broken header.
    """
    size = file.seek(0, 2)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while member := archive.next():
                if member.offset_data + member.size > size:
                    raise _DamagedError(f"{member.name} is cut off")
                yield member
            end = archive.offset
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise _DamagedError(str(error)) from None
    # tarfile takes a broken header for the end; the true end is a block of zeros.
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise _DamagedError(f"no header and no end mark at byte {end}")


class _Index:
    """The samples of one shard: where the picture is and what the captions say, by the stem of the members."""

    def __init__(self, shard: str, wanted: Sequence[str]) -> None:
        self.shard, self.wanted = shard, wanted
        self.samples: dict[str, Row] = {}
        self.left_out: Counter[str] = Counter()

    def add(self, member: tarfile.TarInfo, file: BinaryIO) -> None:
        """Take note of a member; folders and other kinds of files are passed over."""
        path = PurePosixPath(member.name)
        if member.isdir():
            return
        if not member.isreg() or member.issparse() or path.is_absolute() or ".." in path.parts:
            self.left_out["links, devices or paths that lead out"] += 1
            return
        stem, dot, extension = path.name.partition(".")
        suffix = (dot + extension).lower()
        sample = self.samples.setdefault(str(path.parent / stem), {"captions": []})
        if suffix in PICTURES and "name" in sample:
            self.left_out["second pictures of a sample"] += 1
        elif suffix in PICTURES:
            sample.update(name=f"{self.shard}/{path}", offset=member.offset_data, size=member.size)
        elif suffix == ".json" or suffix[1:] in self.wanted:
            sample["captions"] += self._captions(suffix, _read(file, member))

    def rows(self, damaged: bool) -> Iterator[Row]:
        """Samples with a picture; of a damaged shard's last one only if its caption came through."""
        last = next(reversed(self.samples), None)
        for key, sample in self.samples.items():
            if "name" not in sample or (damaged and key == last and not sample["captions"]):
                self.left_out["samples without a picture or cut off"] += 1
            else:
                yield {**sample, "shard": self.shard, "captions": clean(sample["captions"]), "problem": ""}

    def _captions(self, suffix: str, data: bytes | None) -> list[Any]:
        try:
            text = (data or b"").decode("utf-8-sig")
            if data is None:
                raise ValueError("too long")
            if suffix != ".json":
                return text.splitlines()
            values = json.loads(text)
            return _from_json(values, self.wanted)
        except (ValueError, RecursionError):
            self.left_out["caption files that are too long, not UTF-8 or not JSON"] += 1
            return []


def _from_json(values: Any, wanted: Sequence[str]) -> list[Any]:
    """What the wanted keys of a JSON object say."""
    found = [values[key] for key in wanted if key in values] if isinstance(values, dict) else []
    return [
        text for value in found for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)
    ]


def _read(file: BinaryIO, member: tarfile.TarInfo) -> bytes | None:
    """A small member's bytes; None if it is large."""
    if member.size > MAX_TEXT:
        return None
    file.seek(member.offset_data)
    return file.read(member.size)
