"""WebDataset shards: tar files in which neighbouring members with the same stem are one sample.

The members are indexed once, by their place in the file, and nothing is ever unpacked. A damaged shard gives the
samples before the damage; what is lost is counted in a row of its own and said every time the shard is opened.
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

from ..errors import LatentDiffError
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
    """The samples of some shards, in order.

    Args:
        root: folder that the names of the shards are relative to.
        shards: uncompressed tar files below it.
        config: its `caption_columns` are extensions and keys of JSON files that hold captions; empty: the usual ones.

    Raises:
        LatentDiffError: none of them holds a picture.
    """
    names = tuple(shard.relative_to(root).as_posix() for shard in shards)
    wanted, stamp = config.caption_columns or CAPTION_NAMES, stamp_of(root, shards)
    arguments = {"root": str(root), "names": names, "wanted": wanted, "stamp": stamp}
    table = Dataset.from_generator(_index_shards, features=FEATURES, gen_kwargs=arguments)
    problems = table["problem"][:]
    for index, problem in enumerate(problems):
        if problem:
            logger.warning("%s: %s", root / table[index]["shard"], problem)
    rows = np.flatnonzero([not problem for problem in problems]).astype(np.int64)
    if not len(rows):
        raise LatentDiffError(f"{root}: no pictures in {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
    return Source(table, TarReader(root), ("captions",), stamp, rows)


def _index_shards(root: str, names: Sequence[str], wanted: Sequence[str], stamp: str) -> Iterator[Row]:
    """For each shard one row a sample, then one with `problem` set if anything was left out.

    `stamp` only makes a table of changed shards another one in the cache of datasets.
    """
    for name in names:
        shard, problems = _Shard(name, wanted), []
        try:
            with (Path(root) / name).open("rb") as file:
                for member in _members(file):
                    shard.add(member, file)
        except (tarfile.TarError, OSError) as error:
            problems.append(f"damaged, and read up to there ({error})")
        yield from shard.rows(damaged=bool(problems))
        if not shard.samples:
            problems.append("no samples in it")
        problems += [f"left out {count} {what}" for what, count in sorted(shard.left_out.items())]
        if problems:
            yield {"shard": name, "name": "", "offset": 0, "size": 0, "captions": [], "problem": "; ".join(problems)}


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Members that are there to the last byte.

    Raises:
        tarfile.TarError: the file ends within a member or without an end mark, or has a broken header.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while member := archive.next():
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                yield member
            end = archive.offset
    except (ValueError, EOFError) as error:
        raise tarfile.ReadError(str(error)) from None
    # tarfile takes a broken header for the end; the true end is a block of zeros.
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError(f"no header and no end mark at byte {end}")


class _Shard:
    """The samples of one shard: where the picture is and what the captions say, by the stem of the members."""

    def __init__(self, name: str, wanted: Sequence[str]) -> None:
        self.name, self.wanted = name, wanted
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
        if suffix in EXTENSIONS and "name" in sample:
            self.left_out["second pictures of a sample"] += 1
        elif suffix in EXTENSIONS:
            sample.update(name=f"{self.name}/{path}", offset=member.offset_data, size=member.size)
        elif suffix == ".json" or suffix[1:] in self.wanted:
            sample["captions"] += self._captions(suffix, member, file)

    def rows(self, damaged: bool) -> Iterator[Row]:
        """Samples with a picture; of a damaged shard's last one only if its caption came through."""
        last = next(reversed(self.samples), None)
        for key, sample in self.samples.items():
            if "name" not in sample or (damaged and key == last and not sample["captions"]):
                self.left_out["samples without a picture or cut off"] += 1
            else:
                yield {**sample, "shard": self.name, "captions": clean_captions(sample["captions"]), "problem": ""}

    def _captions(self, suffix: str, member: tarfile.TarInfo, file: BinaryIO) -> list[str]:
        """Each line of a text, or what the wanted keys of a JSON object say."""
        try:
            if member.size > MAX_TEXT:
                raise ValueError("too long")
            file.seek(member.offset_data)
            text = file.read(member.size).decode("utf-8-sig")
            if suffix != ".json":
                return text.splitlines()
            values = json.loads(text)
        except (ValueError, RecursionError):
            self.left_out["caption files that are too long, not UTF-8 or not JSON"] += 1
            return []
        found = [values[key] for key in self.wanted if key in values] if isinstance(values, dict) else []
        texts = [text for value in found for text in (value if isinstance(value, list) else [value])]
        return [text for text in texts if isinstance(text, str)]
