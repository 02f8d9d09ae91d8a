"""WebDataset shards: tar files in which consecutive members with the same stem form a sample.

Members are indexed once by their offset in the file, and nothing is ever unpacked. A damaged shard yields the samples
before the damage; what was lost is recorded in an extra row and reported every time the shard is opened.
"""

import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from datasets import Dataset, Features, List, Value  # type: ignore[import-untyped]

from ..errors import LatentDiffError, one_line
from ..sections import DataConfig
from .pictures import EXTENSIONS
from .readers import Source, TarReader, clean_captions, stamp_of
from .tables import CAPTION_NAMES

MAX_TEXT = 1 << 20  # bytes of a caption file
BLOCK = 512
TEXT, NUMBER = Value("string"), Value("int64")
FEATURES = Features(shard=TEXT, name=TEXT, offset=NUMBER, size=NUMBER, captions=List(TEXT), problem=TEXT)
Row = dict[str, Any]

logger = logging.getLogger(__name__)


def open_tars(root: Path, shards: Sequence[Path], config: DataConfig) -> Source:
    """Open uncompressed tar files below `root` as one source; raises LatentDiffError if they contain no pictures.

    `config.caption_columns` are the extensions and JSON keys that hold captions; empty: `CAPTION_NAMES`.
    """
    names = tuple(shard.relative_to(root).as_posix() for shard in shards)
    caption_keys, stamp = config.caption_columns or CAPTION_NAMES, stamp_of(root, shards)
    arguments = {"root": str(root), "names": names, "caption_keys": caption_keys, "stamp": stamp}
    table = Dataset.from_generator(_index_shards, features=FEATURES, gen_kwargs=arguments)
    problems = table["problem"][:]
    for index, problem in enumerate(problems):
        if problem:
            logger.warning("%s: %s", root / table[index]["shard"], one_line(problem))
    rows = np.flatnonzero([not problem for problem in problems]).astype(np.int64)
    if not len(rows):
        raise LatentDiffError(f"{root}: no pictures in {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
    return Source(table, TarReader(root), ("captions",), stamp, rows)


def _index_shards(root: str, names: Sequence[str], caption_keys: Sequence[str], stamp: str) -> Iterator[Row]:
    """Yield one row per sample, and for each shard with problems another row that describes them.

    `stamp` only serves to give changed shards another key in the cache of `datasets`.
    """
    for name in names:
        shard, problems = _Shard(name, caption_keys), []
        try:
            with (Path(root) / name).open("rb") as file:
                for member in _members(file):
                    shard.add(member, file)
        except (tarfile.TarError, OSError) as error:
            problems.append(f"damaged, and only read up to the damage ({error})")
        yield from shard.rows(damaged=bool(problems))
        if not shard.samples:
            problems.append("contains no samples")
        problems += [f"skipped {count} {what}" for what, count in sorted(shard.skipped.items())]
        if problems:
            yield {"shard": name, "name": "", "offset": 0, "size": 0, "captions": [], "problem": "; ".join(problems)}


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield members that are complete to the last byte.

    Raises tarfile.TarError if the file ends within a member or without an end-of-archive marker, or a header is broken.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while member := archive.next():
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is truncated")
                yield member
            end = archive.offset
    except (ValueError, EOFError) as error:
        raise tarfile.ReadError(str(error)) from None
    # tarfile takes a broken header for the end of the archive; the real end is a block of zeros.
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError(f"neither header nor end-of-archive marker at byte {end}")


class _Shard:
    """The samples of one shard by member stem: where the picture is, and its captions."""

    def __init__(self, name: str, caption_keys: Sequence[str]) -> None:
        self.name, self.caption_keys = name, caption_keys
        self.samples: dict[str, Row] = {}
        self.skipped: Counter[str] = Counter()

    def add(self, member: tarfile.TarInfo, file: BinaryIO) -> None:
        """Index a member; folders and irrelevant files are ignored."""
        path = PurePosixPath(member.name)
        if member.isdir():
            return
        if not member.isreg() or member.issparse() or path.is_absolute() or ".." in path.parts:
            self.skipped["links, devices or paths outside the shard"] += 1
            return
        stem, dot, extension = path.name.partition(".")
        suffix = (dot + extension).lower()
        sample = self.samples.setdefault(str(path.parent / stem), {"captions": []})
        if suffix in EXTENSIONS and "name" in sample:
            self.skipped["surplus pictures of a sample"] += 1
        elif suffix in EXTENSIONS:
            sample.update(name=f"{self.name}/{path}", offset=member.offset_data, size=member.size)
        elif suffix == ".json" or suffix[1:] in self.caption_keys:
            sample["captions"] += self._captions(suffix, member, file)

    def rows(self, damaged: bool) -> Iterator[Row]:
        """Yield the samples with a picture; the last one of a damaged shard only if it has its captions."""
        last = next(reversed(self.samples), None)
        for key, sample in self.samples.items():
            if "name" not in sample or (damaged and key == last and not sample["captions"]):
                self.skipped["samples without a picture or truncated"] += 1
            else:
                yield {**sample, "shard": self.name, "captions": clean_captions(sample["captions"]), "problem": ""}

    def _captions(self, suffix: str, member: tarfile.TarInfo, file: BinaryIO) -> list[str]:
        """Return the lines of a text file, or the values of the caption keys in a JSON object."""
        try:
            if member.size > MAX_TEXT:
                raise ValueError("too long")
            file.seek(member.offset_data)
            text = file.read(member.size).decode("utf-8-sig")
            if suffix != ".json":
                return text.splitlines()
            values = json.loads(text)
        except (ValueError, RecursionError):
            self.skipped["caption files that are too long, not UTF-8 or not JSON"] += 1
            return []
        found = [values[key] for key in self.caption_keys if key in values] if isinstance(values, dict) else []
        texts = [text for value in found for text in (value if isinstance(value, list) else [value])]
        return [text for text in texts if isinstance(text, str)]
