"""Where the bytes of a picture are: in a file, in a cell of a table, or inside a tar shard."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]

from .pictures import PictureError

Indices = np.ndarray[Any, np.dtype[np.int64]]


class Reader(Protocol):
    """How the rows of a table become pictures."""

    @property
    def name_columns(self) -> tuple[str, ...]:
        """Columns that `name` looks at."""

    @property
    def picture_columns(self) -> tuple[str, ...]:
        """Columns that `read` looks at."""

    def name(self, index: int, row: Mapping[str, Any]) -> str:
        """What to call the picture in row `index`: the same on every machine and in every run."""

    def read(self, row: Mapping[str, Any]) -> bytes:
        """The encoded picture.

        Raises:
            PictureError: unreadable.
        """


@dataclass(frozen=True)
class Rows:
    """Rows of a table with the columns of captions and the reader of their pictures."""

    table: Dataset
    reader: Reader
    caption_columns: tuple[str, ...]
    stamp: str  # changes when the files behind the table do
    indices: Indices  # rows that belong to it

    def select(self, indices: Indices) -> Rows:
        """The same with other rows of the table."""
        return replace(self, indices=indices)


@dataclass(frozen=True)
class FileReader:
    """One file a picture; the table has its path from `root` on, with slashes."""

    root: Path
    prefix: str = ""  # of the names: root as seen from the source
    name_columns: tuple[str, ...] = ("file_name",)
    picture_columns: tuple[str, ...] = ("file_name",)

    def name(self, index: int, row: Mapping[str, Any]) -> str:
        """The path of the file."""
        return self.prefix + str(row["file_name"])

    def read(self, row: Mapping[str, Any]) -> bytes:
        """All of the file."""
        return read_bytes(inside(self.root, str(row["file_name"])))


@dataclass(frozen=True)
class ColumnReader:
    """Pictures in a column of structures with bytes and path, as datasets keeps them."""

    column: str
    files: tuple[str, ...]  # the tables, as they are called in names, in the order of their rows
    ends: tuple[int, ...]  # row after the last of each file
    root: Path  # of relative paths
    name_columns: tuple[str, ...] = ()

    @property
    def picture_columns(self) -> tuple[str, ...]:
        """The one column."""
        return (self.column,)

    def name(self, index: int, row: Mapping[str, Any]) -> str:
        """File and row."""
        place = bisect_right(self.ends, index)
        return f"{self.files[place]} row {index - (self.ends[place - 1] if place else 0)}"

    def read(self, row: Mapping[str, Any]) -> bytes:
        """The cell's bytes, or else the file at its path."""
        cell = row[self.column] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if cell.get("path"):
            return read_bytes(inside(self.root, str(cell["path"])))
        raise PictureError("unreadable", "the cell is empty")


@dataclass(frozen=True)
class TarReader:
    """Members of tar shards, by their place in the file."""

    root: Path
    name_columns: tuple[str, ...] = ("name",)
    picture_columns: tuple[str, ...] = ("shard", "offset", "size")

    def name(self, index: int, row: Mapping[str, Any]) -> str:
        """Shard and member."""
        return str(row["name"])

    def read(self, row: Mapping[str, Any]) -> bytes:
        """The bytes of the member."""
        return read_bytes(self.root / row["shard"], row["offset"], row["size"])


def inside(root: Path, path: str) -> Path:
    """`root / path`, unless that leads out of root.

    Raises:
        PictureError: unreadable, the path is absolute or has `..` in it.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise PictureError("unreadable", f"{path} leads out of {root}")
    return root / path


def read_bytes(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """`size` bytes of a file from `offset` on; -1 reads to the end.

    Raises:
        PictureError: unreadable, or truncated if the file ends earlier.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
        raise PictureError("unreadable", str(error)) from None
    if len(data) < size:
        raise PictureError("truncated", f"{path} ends before byte {offset + size}")
    return data
