"""Folders with one file per picture, captioned by a metadata table or by a .txt file next to each picture.

Also derives splits from the names of folders and of files with many pictures.
"""

import logging
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value  # type: ignore[import-untyped]

from ..errors import LatentDiffError, check_choice, reraise_as
from ..sections import DataConfig
from .pictures import EXTENSIONS
from .readers import FileReader, Source, stamp_of
from .tables import find_caption_columns, load_table

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FEATURES = Features({"file_name": Value("string"), "captions": List(Value("string"))})
SURROGATES = re.compile("[\ud800-\udfff]")  # how Python decodes bytes of a file name that are not UTF-8
# The names of each split, as in Hugging Face datasets.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

logger = logging.getLogger(__name__)


def open_metadata(root: Path, config: DataConfig) -> dict[str, Source] | None:
    """Open the folder's metadata table, or else those of its split folders, as sources by split; None if none.

    Column `file_name` is relative to the table's folder; without it or a caption column, raises LatentDiffError.
    """
    if table := _metadata_in(root):
        return _split_by_folder(_open_table(root, table, config), config)
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    tables = {split_of_folder(folder.name, config): table for folder in folders if (table := _metadata_in(folder))}
    return {split: _open_table(root, table, config) for split, table in tables.items() if split} or None


def open_text_folder(root: Path, config: DataConfig) -> dict[str, Source]:
    """Open all pictures below a folder as sources by split; each line of the .txt file next to one is a caption."""
    if not (names := list(_pictures(root))):
        raise LatentDiffError(f"{root}: contains neither pictures ({', '.join(EXTENSIONS)}) nor Parquet or tar files")
    stamp = stamp_of(root, (file for name in names for file in (root / name, (root / name).with_suffix(".txt"))))
    table = Dataset.from_generator(_text_rows, features=FEATURES, gen_kwargs={"root": str(root), "stamp": stamp})
    return _split_by_folder(Source(table, FileReader(root), ("captions",), stamp), config)


def split_of_folder(name: str, config: DataConfig) -> str:
    """Return the split that a folder of pictures is named after, by its full name; "" if none."""
    return next((split for split, words in _split_words(config).items() if name.lower() in words), "")


def split_of_file(name: str, config: DataConfig) -> str:
    """Return the split that a file with many pictures belongs to, by a word in its name; "" if none."""
    for split, words in _split_words(config).items():
        if re.search(rf"(?<![a-z0-9])({'|'.join(map(re.escape, words))})(?![a-z0-9])", name.lower()):
            return split
    return ""


def _split_words(config: DataConfig) -> dict[str, tuple[str, ...]]:
    names = (config.train_split, config.validation_split, *SPLITS)
    return {name: SPLITS.get(name, (name.lower(),)) for name in names}


def _split_by_folder(source: Source, config: DataConfig) -> dict[str, Source]:
    """Group pictures by the split that the first folder of their path is named after."""
    splits: dict[str, list[int]] = {}
    for index, name in enumerate(source.names()):
        splits.setdefault(split_of_folder(name.partition("/")[0], config), []).append(index)
    return {split: source.select(indices) for split, indices in splits.items()}


def _metadata_in(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _open_table(root: Path, path: Path, config: DataConfig) -> Source:
    table = load_table([path])
    check_choice(f"column of {path}", "file_name", table.column_names)
    captions = find_caption_columns(table, "file_name", config, str(path))
    table = table.select_columns(["file_name", *captions])
    folder = path.parent
    prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    names = map(str, table.data.column("file_name"))  # read lazily from the memory-mapped table
    files = chain([path], (folder / name for name in names if not os.path.isabs(name)))
    return Source(table, FileReader(folder, prefix), captions, stamp_of(root, files))


def _pictures(root: Path) -> Iterator[str]:
    """Yield the sorted paths of all pictures below a folder, relative to it; hidden files and folders are skipped."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")):
            path = (Path(folder) / name).relative_to(root).as_posix()
            if SURROGATES.search(path):
                logger.warning("%s: skipped %a, whose name is not valid UTF-8", root, path)
            else:
                yield path


def _text_rows(root: str, stamp: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table; `stamp` only serves to give changed files another key in the cache of `datasets`."""
    for name in _pictures(Path(root)):
        yield {"file_name": name, "captions": _lines((Path(root) / name).with_suffix(".txt"))}


def _lines(path: Path) -> list[str]:
    with reraise_as(LatentDiffError, f"{path}: cannot be read as UTF-8", OSError, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    return text.splitlines()
