"""Sources of captioned pictures: the rows of a table on disk, and readers for the bytes of their pictures.

The bytes are in a separate file (`FileReader`), in a cell of the table (`ColumnReader`) or inside a tar shard
(`TarReader`). Nothing is decoded here, and nothing large is held in memory.
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
from .pictures import PictureError, read_bounded

ROWS_PER_READ = 1000
Indices = NDArray[np.int64]


class Source:
    """A sequence of captioned pictures, backed by a memory-mapped table and picklable for worker processes.

    A cell of `caption_columns` is a caption or a list of captions. `stamp` changes whenever the files behind the table
    do. `rows` selects and orders rows of the table; None: all of them.
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
        """Return the encoded picture; raises PictureError if it cannot be read, e.g. because its file is missing."""
        return self.reader.read(self.table[self._row(index)])

    def captions(self, index: int) -> list[str]:
        """Return the picture's captions, stripped and without duplicates; there may be none."""
        return self._captions(self._texts[self._row(index)])

    def all_captions(self) -> Iterator[list[str]]:
        """Yield the captions of all pictures in order, without reading the pictures."""
        return (self._captions(cells) for _, cells in self._all_texts())

    def name(self, index: int) -> str:
        """Return a one-line name of the picture: its path within the source, or file and row."""
        row = self._row(index)
        return self._name(row, self._texts[row])

    def names(self) -> Iterator[str]:
        """Yield the names of all pictures in order."""
        return (self._name(row, cells) for row, cells in self._all_texts())

    def stat_fingerprint(self) -> str:
        """Return a hash of the selected rows and of the files' names, sizes and modification times when opened.

        For a dataset on the hub, its fingerprint in `datasets` stands in for the files.
        """
        parts = (self.stamp.encode(), repr(self.caption_columns).encode(), self.rows.tobytes())
        return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()

    def select(self, indices: Sequence[int] | Indices) -> Source:
        """Return the pictures at `indices` as a source, in that order; raises IndexError if out of range."""
        chosen = self.rows[np.asarray(indices, dtype=np.int64)]
        return Source(self.table, self.reader, self.caption_columns, self.stamp, chosen)

    def without(self, names: Collection[str]) -> Source:
        """Return all pictures but those named, as a source."""
        return self.select(np.flatnonzero([name not in names for name in self.names()]))

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} is out of range: there are {len(self)}")
        return int(self.rows[index])

    def _all_texts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each picture's row number and its cells, except the picture itself, reading many rows at once."""
        for start in range(0, len(self), ROWS_PER_READ):
            rows = self.rows[start : start + ROWS_PER_READ].tolist()
            columns = self._texts[rows]
            for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
                yield row, dict(zip(columns, cells, strict=True))

    def _captions(self, cells: Mapping[str, Any]) -> list[str]:
        return clean_captions(cells[column] for column in self.caption_columns)

    def _name(self, row: int, cells: Mapping[str, Any]) -> str:
        # File names may contain tabs and line breaks, which are separators in lists of names.
        return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", self.reader.name(row, cells))


class FileReader(NamedTuple):
    """One file per picture; the table holds its path relative to `root`, with forward slashes."""

    root: Path

    def name(self, row: int, cells: Mapping[str, Any]) -> str:
        """Return the path of the file within the source."""
        return str(cells["file_name"])

    def read(self, cells: Mapping[str, Any]) -> bytes:
        """Read the file."""
        return _read(self.root, str(cells["file_name"]))


class ColumnReader(NamedTuple):
    """Pictures in a column of {bytes, path} structs, as `datasets` stores them."""

    column: str
    files: tuple[str, ...]  # names of the table files, in row order
    ends: tuple[int, ...]  # one past the last row of each file
    root: Path  # for relative paths

    def name(self, row: int, cells: Mapping[str, Any]) -> str:
        """Return file and row."""
        number = bisect_right(self.ends, row)
        return f"{self.files[number]} row {row - (self.ends[number - 1] if number else 0)}"

    def read(self, cells: Mapping[str, Any]) -> bytes:
        """Return the cell's bytes, or else read the file at its path."""
        cell = cells[self.column] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if cell.get("path"):
            return _read(self.root, str(cell["path"]))
        raise PictureError("unreadable", "the cell is empty")


class TarReader(NamedTuple):
    """Members of tar shards, located by offset and size."""

    root: Path

    def name(self, row: int, cells: Mapping[str, Any]) -> str:
        """Return shard and member."""
        return str(cells["name"])

    def read(self, cells: Mapping[str, Any]) -> bytes:
        """Return the member's bytes."""
        return _read(self.root, cells["shard"], cells["offset"], cells["size"])


# `name` is the same on every machine and in every run; `read` may raise PictureError.
Reader = FileReader | ColumnReader | TarReader


def clean_captions(cells: Iterable[Any]) -> list[str]:
    """Return the captions in a row's cells in order, stripped and without duplicates; raises if a cell is not text."""
    found: dict[str, None] = {}
    for cell in cells:
        for value in cell if isinstance(cell, list | tuple) else [cell]:
            # A table may have a column of numbers as captions.
            if value is not None and not isinstance(value, str | int | float):
                kind = type(value).__name__
                raise LatentDiffError(f"caption {str(value)[:80]!r}: expected a string or list of strings, not {kind}")
            found["" if value is None else str(value).strip()] = None
    return [text for text in found if text]


def stamp_of(root: Path, files: Iterable[Path]) -> str:
    """Return a hash of the files' paths relative to `root`, sizes and modification times (ns), or their absence."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            stat = file.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except (OSError, ValueError):
            state = "missing"
        digest.update(f"{file.relative_to(root).as_posix()}\0{state}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read(root: Path, path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Read `size` bytes (None: to the end) at `offset`; raises PictureError, also if `path` leaves `root`."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise PictureError("unreadable", f"{path} is outside {root}")
    try:
        data = read_bounded(root / path, offset, size)
    except PictureError:  # a ValueError as well
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise PictureError("unreadable", str(error)) from None
    if size is not None and len(data) < size:
        raise PictureError("truncated", f"{root / path} ends before byte {offset + size}")
    return data
