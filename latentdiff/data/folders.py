"""Folders with one file a picture, whose captions stand in a metadata table or in a .txt file beside each picture."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset  # type: ignore[import-untyped]

from ..errors import LatentDiffError, check_choice
from .captions import find_caption_columns
from .readers import FileReader, Rows
from .splits import split_of_folder
from .stamps import literal, stamp_of

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# The format's name in datasets, and settings: as they are, a CSV caption such as "None" would be no caption.
METADATA: dict[str, tuple[str, dict[str, Any]]] = {
    "metadata.jsonl": ("json", {}),
    "metadata.csv": ("csv", {"keep_default_na": False}),
    "metadata.parquet": ("parquet", {}),
}
FEATURES = Features({"file_name": Value("string"), "captions": List(Value("string"))})
NAMES_AT_A_TIME = 10_000

logger = logging.getLogger(__name__)


def find_metadata(root: Path, asked: Sequence[str]) -> dict[str, Path]:
    """Metadata tables by split: the folder's own under "", or else those of its split folders."""
    if table := _metadata_in(root):
        return {"": table}
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        split = split_of_folder(folder.name, asked)
        table = _metadata_in(folder)
        if split and table:
            found[split] = table
    return found


def open_metadata(
    root: Path, tables: dict[str, Path], caption_names: Sequence[str], asked: Sequence[str]
) -> dict[str, Rows]:
    """Rows by split, from metadata tables whose column `file_name` is relative to the table's folder.

    Raises:
        LatentDiffError: a table has no such column, or none with captions.
    """
    rows = {split: _metadata_rows(root, path, caption_names) for split, path in tables.items()}
    return _by_folder(rows[""], asked) if "" in rows else rows


def open_text_folder(root: Path, asked: Sequence[str]) -> dict[str, Rows]:
    """Rows by split, from all pictures below a folder, each line of the .txt file beside one being a caption.

    Raises:
        LatentDiffError: no pictures, or a caption file that is not UTF-8.
    """
    names = list(_pictures(root))
    if not names:
        raise LatentDiffError(f"{root}: no pictures in it ({', '.join(PICTURES)}), nor Parquet or tar files")
    files = (file for name in names for file in (root / name, _captions_beside(root / name)))
    stamp = stamp_of(root, files)
    table = Dataset.from_generator(_text_rows, features=FEATURES, gen_kwargs={"root": str(root), "stamp": stamp})
    return _by_folder(Rows(table, FileReader(root), ("captions",), stamp, _all(table)), asked)


def _metadata_in(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _metadata_rows(root: Path, path: Path, caption_names: Sequence[str]) -> Rows:
    kind, settings = METADATA[path.name]
    table = load_dataset(kind, data_files={"train": [literal(path)]}, **settings)["train"]
    check_choice(f"column of {path}", "file_name", table.column_names)
    others = [name for name in table.column_names if name != "file_name"]
    columns = find_caption_columns(others, caption_names, str(path))
    folder = path.parent
    prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    pictures = (folder / name for name in _names(table) if not os.path.isabs(name))
    stamp = stamp_of(root, chain([path], pictures))
    return Rows(table, FileReader(folder, prefix), columns, stamp, _all(table))


def _by_folder(rows: Rows, asked: Sequence[str]) -> dict[str, Rows]:
    """The rows apart by the first folder of their paths, where that is called like a split."""
    splits: dict[str, list[int]] = {}
    for index, name in enumerate(_names(rows.table)):
        splits.setdefault(split_of_folder(name.partition("/")[0], asked), []).append(index)
    return {split: rows.select(np.array(indices, dtype=np.int64)) for split, indices in splits.items()}


def _names(table: Dataset) -> Iterator[str]:
    column = table.select_columns(["file_name"])
    for start in range(0, len(table), NAMES_AT_A_TIME):
        yield from map(str, column[start : start + NAMES_AT_A_TIME]["file_name"])


def _all(table: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(len(table), dtype=np.int64)


def _pictures(root: Path) -> Iterator[str]:
    """Pictures below a folder, relative to it, sorted; hidden files and folders are passed over."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = (Path(folder) / name).relative_to(root).as_posix()
            if name.startswith(".") or not name.lower().endswith(PICTURES):
                continue
            if not _is_unicode(path):
                logger.warning("%s: left out %a, whose name is not valid UTF-8", root, path)
                continue
            yield path


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _captions_beside(picture: Path) -> Path:
    return picture.with_suffix(".txt")


def _text_rows(root: str, stamp: str) -> Iterator[dict[str, Any]]:
    """Rows of the table; `stamp` only makes a changed folder's table another one in the cache of datasets."""
    for name in _pictures(Path(root)):
        yield {"file_name": name, "captions": _lines(_captions_beside(Path(root) / name))}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise LatentDiffError(f"{path}: cannot be read as UTF-8 ({error})") from None
