"""A source of captioned pictures: rows of a table on disk, and where the bytes of their pictures are.

The bytes are in a file of their own (`FileReader`), in a cell of the table (`ColumnReader`) or inside a tar shard
(`TarReader`). Nothing is decoded and nothing large is held in memory.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ..errors import LatentDiffError
from .pictures import PictureError

ROWS_AT_A_TIME = 1000
Indices = NDArray[np.int64]


class Source:
    """A sequence of captioned pictures: rows of a table that lies on disk. Can be sent to worker processes.

    Args:
        table: memory-mapped, with the columns of captions and those that the reader looks at.
        reader: how its rows become pictures.
        caption_columns: each cell a caption or a list of captions.
        stamp: changes when the files behind the table do.
        rows: those of the table that belong to the source, in order; None: all.
    """

    def __init__(
        self, table: Dataset, reader: Reader, caption_columns: tuple[str, ...], stamp: str, rows: Indices | None = None
    ) -> None:
        self.table, self.reader, self.caption_columns, self.stamp = table, reader, caption_columns, stamp
        self.rows = np.arange(len(table), dtype=np.int64) if rows is None else rows
        self._texts = table.remove_columns([reader.column]) if isinstance(reader, ColumnReader) else table

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes:
        """The encoded picture.

        Raises:
            PictureError: unreadable, for example because its file is gone.
        """
        return self.reader.read(self.table[self._row(index)])

    def captions(self, index: int) -> list[str]:
        """The picture's captions, stripped, each once; perhaps none."""
        return self._captions(self._texts[self._row(index)])

    def all_captions(self) -> Iterator[list[str]]:
        """`captions` of all pictures in order, without a look at the pictures."""
        return (self._captions(cells) for _, cells in self._all_texts())

    def name(self, index: int) -> str:
        """What to call the picture, on one line: its path within the source, or the file and row."""
        row = self._row(index)
        return self._name(row, self._texts[row])

    def names(self) -> Iterator[str]:
        """`name` of all pictures in order."""
        return (self._name(row, cells) for row, cells in self._all_texts())

    def stat_fingerprint(self) -> str:
        """Changes with the pictures chosen, and with names, sizes and times of the files as they were when opened.

        For a data set on the hub: with its fingerprint in datasets.
        """
        parts = (self.stamp.encode(), repr(self.caption_columns).encode(), self.rows.tobytes())
        return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()

    def select(self, indices: Sequence[int] | Indices) -> Source:
        """The pictures at these places, in this order.

        Raises:
            IndexError: out of range.
        """
        chosen = self.rows[np.asarray(indices, dtype=np.int64)]
        return Source(self.table, self.reader, self.caption_columns, self.stamp, chosen)

    def without(self, names: Collection[str]) -> Source:
        """All but the pictures of these names."""
        return self.select(np.flatnonzero([name not in names for name in self.names()]))

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        return int(self.rows[index])

    def _all_texts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row of each picture in the table, and its cells but for the picture itself, read some at a time."""
        for start in range(0, len(self), ROWS_AT_A_TIME):
            rows = self.rows[start : start + ROWS_AT_A_TIME].tolist()
            columns = self._texts[rows]
            for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
                yield row, dict(zip(columns, cells, strict=True))

    def _captions(self, cells: Mapping[str, Any]) -> list[str]:
        return clean_captions(cells[column] for column in self.caption_columns)

    def _name(self, row: int, cells: Mapping[str, Any]) -> str:
        """A file's name may hold tabs and line breaks; a list of names may not."""
        return re.sub(r"[\t\r\n]", " ", self.reader.name(row, cells))


class FileReader(NamedTuple):
    """One file a picture; the table has its path from `root` on, with slashes."""

    root: Path
    prefix: str = ""  # of the names: root as seen from the source

    def name(self, row: int, cells: Mapping[str, Any]) -> str:
        """The path of the file."""
        return self.prefix + str(cells["file_name"])

    def read(self, cells: Mapping[str, Any]) -> bytes:
        """All of the file."""
        return _read(self.root, str(cells["file_name"]))


class ColumnReader(NamedTuple):
    """Pictures in a column of structures with bytes and path, as datasets keeps them."""

    column: str
    files: tuple[str, ...]  # the tables, as they are called in names, in the order of their rows
    ends: tuple[int, ...]  # row after the last of each file
    root: Path  # of relative paths

    def name(self, row: int, cells: Mapping[str, Any]) -> str:
        """File and row."""
        place = bisect_right(self.ends, row)
        return f"{self.files[place]} row {row - (self.ends[place - 1] if place else 0)}"

    def read(self, cells: Mapping[str, Any]) -> bytes:
        """The cell's bytes, or else the file at its path."""
        cell = cells[self.column] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if cell.get("path"):
            return _read(self.root, str(cell["path"]))
        raise PictureError("unreadable", "the cell is empty")


class TarReader(NamedTuple):
    """Members of tar shards, by their place in the file."""

    root: Path

    def name(self, row: int, cells: Mapping[str, Any]) -> str:
        """Shard and member."""
        return str(cells["name"])

    def read(self, cells: Mapping[str, Any]) -> bytes:
        """The bytes of the member."""
        return _read(self.root, cells["shard"], cells["offset"], cells["size"])


# `name` is the same on every machine and in every run; `read` raises PictureError.
Reader = FileReader | ColumnReader | TarReader


def clean_captions(cells: Iterable[Any]) -> list[str]:
    """All captions in the cells of a row: stripped, without empty ones, each once, in order.

    Raises:
        LatentDiffError: a cell holds neither text nor a list of texts.
    """
    found: dict[str, None] = {}
    for cell in cells:
        for value in cell if isinstance(cell, list | tuple) else [cell]:
            # A column of numerals is a column of numbers to whoever reads CSV.
            if value is not None and not isinstance(value, str | int | float):
                kind = type(value).__name__
                raise LatentDiffError(f"caption {str(value)[:80]!r}: expected text or a list of texts, not {kind}")
            found["" if value is None else str(value).strip()] = None
    return [text for text in found if text]


def stamp_of(root: Path, files: Iterable[Path]) -> str:
    """A text that changes when files do: with their paths from `root` on, sizes, times (ns), and whether they exist."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            stat = file.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except (OSError, ValueError):
            state = "missing"
        digest.update(f"{file.relative_to(root).as_posix()}\0{state}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read(root: Path, path: str, offset: int = 0, size: int = -1) -> bytes:
    """`size` bytes of the file at `root / path` from `offset` on; -1 reads to the end.

    Raises:
        PictureError: unreadable, also where the path is absolute or has `..` in it; truncated if the file ends earlier.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise PictureError("unreadable", f"{path} leads out of {root}")
    try:
        with (root / path).open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
        raise PictureError("unreadable", str(error)) from None
    if len(data) < size:
        raise PictureError("truncated", f"{root / path} ends before byte {offset + size}")
    return data
