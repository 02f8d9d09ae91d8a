"""A sequence of captioned pictures, be they a folder, Parquet files, tar shards or a data set on the hub.

Nothing is decoded and nothing large is held in memory: tables are mapped, pictures are read when asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LatentDiffError
from .captions import clean
from .opening import open_splits
from .readers import Indices, Rows

if TYPE_CHECKING:
    from ..sections import DataConfig

ROWS_AT_A_TIME = 1000


class Source:
    """A sequence of captioned pictures: rows of a table that lies on disk. Can be sent to worker processes."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._captions = rows.table.select_columns(list(rows.caption_columns))
        self._names = rows.table.select_columns(list(rows.reader.name_columns)) if rows.reader.name_columns else None
        self._pictures = rows.table.select_columns(list(rows.reader.picture_columns))

    def __len__(self) -> int:
        return len(self.rows.indices)

    def read(self, index: int) -> bytes:
        """The encoded picture.

        Raises:
            PictureError: unreadable, for example because its file is gone.
        """
        return self.rows.reader.read(self._pictures[self._row(index)])

    def captions(self, index: int) -> list[str]:
        """The picture's captions, stripped, each once; perhaps none."""
        return clean(self._captions[self._row(index)].values())

    def all_captions(self) -> Iterator[list[str]]:
        """`captions` of all pictures in order, without a look at the pictures."""
        for _, columns in self._batches(self._captions):
            for cells in zip(*columns.values(), strict=True):
                yield clean(cells)

    def name(self, index: int) -> str:
        """What to call the picture, on one line: its path within the source, or the file and row."""
        row = self._row(index)
        return _one_line(self.rows.reader.name(row, self._names[row] if self._names is not None else {}))

    def names(self) -> Iterator[str]:
        """`name` of all pictures in order."""
        if self._names is None:
            yield from (_one_line(self.rows.reader.name(int(row), {})) for row in self.rows.indices)
            return
        for rows, columns in self._batches(self._names):
            for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
                yield _one_line(self.rows.reader.name(row, dict(zip(columns, cells, strict=True))))

    def stat_fingerprint(self) -> str:
        """Changes with the pictures chosen, and with names, sizes and times of the files as they were when opened.

        For a data set on the hub: with its fingerprint in datasets.
        """
        parts = (self.rows.stamp.encode(), repr(self.rows.caption_columns).encode(), self.rows.indices.tobytes())
        return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()

    def select(self, indices: Sequence[int] | Indices) -> Source:
        """The pictures at these places, in this order.

        Raises:
            IndexError: out of range.
        """
        return Source(self.rows.select(self.rows.indices[np.asarray(indices, dtype=np.int64)]))

    def without(self, names: Collection[str]) -> Source:
        """All but the pictures of these names."""
        return self.select(np.flatnonzero([name not in names for name in self.names()]))

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        return int(self.rows.indices[index])

    def _batches(self, table: Any) -> Iterator[tuple[list[int], dict[str, list[Any]]]]:
        """Row numbers and columns of the rows that belong to the source, some at a time."""
        for start in range(0, len(self), ROWS_AT_A_TIME):
            rows = self.rows.indices[start : start + ROWS_AT_A_TIME].tolist()
            yield rows, table[rows]


def open_source(config: DataConfig) -> tuple[Source, Source]:
    """The pictures to train on and the held-out ones, without those in quarantine.

    Raises:
        LatentDiffError: no such source, a split without pictures or captions, a wrong column, no quarantine file.
    """
    splits = {name: Source(rows) for name, rows in open_splits(config).items()}
    if config.quarantine is not None:
        bad = read_quarantine(config.quarantine)
        splits = {name: source.without(bad) for name, source in splits.items()}
    train = splits.get(config.train_split, splits.get(""))
    if train is None:
        found = ", ".join(sorted(splits)) or "none"
        raise LatentDiffError(f"{config.source}: no split data.train_split={config.train_split!r}; there are: {found}")
    validation = splits.get(config.validation_split)
    if validation is None:
        train, validation = hold_out(train, config.validation_share)
    for split, source in ((config.train_split, train), (config.validation_split, validation)):
        if not len(source):
            raise LatentDiffError(f"{config.source}: the split {split!r} has no pictures")
        if not any(source.all_captions()):
            raise LatentDiffError(f"{config.source}: no picture of the split {split!r} has a caption")
    return train, validation


def hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """Part a source into (the rest, about `share` of it), by a hash of the names: whatever else is in it or its order.

    Raises:
        LatentDiffError: fewer than two pictures.
    """
    if len(source) < 2:
        raise LatentDiffError(f"{len(source)} pictures: too few to hold one out for validation")
    keys = np.array([_hash(name) for name in source.names()])
    held = keys < share
    held[keys.argmin()], held[keys.argmax()] = True, False  # of a handful of pictures, too
    return source.select(np.flatnonzero(~held)), source.select(np.flatnonzero(held))


def read_quarantine(path: str | Path) -> set[str]:
    """Names from a file with one `name<TAB>reason` a line.

    Raises:
        LatentDiffError: it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LatentDiffError(f"data.quarantine={str(path)!r}: cannot be read ({error})") from None
    return {line.partition("\t")[0] for line in text.split("\n") if line.strip()}


def _one_line(name: str) -> str:
    """A file's name may hold tabs and line breaks; a list of names may not."""
    return name.translate({ord(letter): " " for letter in "\t\r\n"})


def _hash(name: str) -> float:
    """A number in [0, 1] from a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest(), "big") / 2**64
