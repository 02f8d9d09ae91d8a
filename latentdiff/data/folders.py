"""Folders with one file per picture, captioned by metadata tables or by a .txt file next to each picture.

Also derives splits from the names of folders and of files with many pictures.
"""

import posixpath
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value  # type: ignore[import-untyped]

from ..errors import LatentDiffError, check_choice
from ..sections import DataConfig
from .left_out import LeftOut
from .listing import Listing
from .metadata import columns_and_names, table_rows
from .readers import FileReader, Source, clean_captions, stamp_of
from .tables import CAPTION_NAMES, find_caption_columns
from .texts import decode, encoding_of, lines_of

TEXT = Value("string")
# `problem`: why the row is not used; `remark`: what is unusual about its captions; "" if nothing is.
FEATURES = Features(file_name=TEXT, captions=List(TEXT), problem=TEXT, remark=TEXT)
# The names of each split, as in Hugging Face datasets.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def open_metadata(listing: Listing, config: DataConfig, left_out: LeftOut) -> dict[str, Source]:
    """Open the tables of a folder: the one at its top, or else all that lie in no other's folder.

    Column `file_name` is relative to the table's folder; without it or a caption column, raises LatentDiffError.
    """
    root, tables = listing.root, _outermost(listing.tables)
    left_out.add("tables below the folder of another", sorted(set(listing.tables) - set(tables)))
    scanned = {table: columns_and_names(root / table) for table in tables}
    columns = [_caption_columns(root / table, found, config) for table, (found, _) in scanned.items()]
    if not config.caption_columns:
        others = (f"{name} of {table}" for (table, (found, _)), chosen in zip(scanned.items(), columns, strict=True)
                  for name in CAPTION_NAMES if name in found and name not in chosen)  # fmt: skip
        left_out.remark("columns with a usual name for captions that are not read (data.caption_columns)", others)
    files = (posixpath.normpath(posixpath.join(posixpath.dirname(table), name))
             for table, (_, names) in scanned.items() for name in names)  # fmt: skip
    within = (root / file for file in files if not file.startswith(("/", "..")))
    stamp = stamp_of(root, chain((root / table for table in tables), within))
    source = _generate(_metadata_rows, {"tables": tables, "columns": columns}, root, stamp, left_out)
    named = set(source.table["file_name"])
    left_out.add("pictures that no table names", (name for name in listing.pictures if name not in named))
    left_out.add("texts beside pictures that a table names", listing.caption_files)
    left_out.add("Parquet and tar files beside a table with names of pictures", listing.shards)
    return _split_by_folder(source, config, left_out)


def open_text_folder(listing: Listing, config: DataConfig, left_out: LeftOut) -> dict[str, Source]:
    """Open all pictures of a folder as sources by split; each line of the .txt file next to one is a caption."""
    root, pairs = listing.root, list(listing.pictures.items())
    stamp = stamp_of(root, (root / file for pair in pairs for file in pair if file is not None))
    left_out.add("Parquet and tar files beside pictures with captions", listing.shards)
    source = _generate(_text_rows, {"pairs": pairs}, root, stamp, left_out)
    return _split_by_folder(source, config, left_out)


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


def _split_by_folder(source: Source, config: DataConfig, left_out: LeftOut) -> dict[str, Source]:
    """Group pictures by the split that the first folder of their path is named after."""
    splits: dict[str, list[int]] = {}
    others = set()  # first folders that are no splits; "" stands for loose pictures
    for index, name in enumerate(source.names()):
        folder = name.rpartition("/")[0].partition("/")[0]
        splits.setdefault(split := split_of_folder(folder, config), []).append(index)
        others |= set() if split else {folder}
    named = [split for split in splits if split]
    # A lone `train` among class folders is a vehicle, and so is a `test` among several: of two, it may be held back.
    is_class = named == [config.train_split] or (named == ["test"] != [config.validation_split] and len(others) > 1)
    if is_class and others and "" not in others:
        left_out.remark("called like a split, but used with the folders beside it", named)
        splits = {"": list(range(len(source)))}
    return {split: source.select(indices) for split, indices in splits.items()}


def _outermost(tables: Sequence[str]) -> list[str]:
    """Return the tables that lie in no folder with another table above them."""
    folders = {posixpath.dirname(table) for table in tables}
    return [table for table in tables if not any(_is_above(folder, posixpath.dirname(table)) for folder in folders)]


def _is_above(folder: str, other: str) -> bool:
    return folder != other and (not folder or other.startswith(f"{folder}/"))


def _caption_columns(path: Path, columns: Sequence[str], config: DataConfig) -> tuple[str, ...]:
    check_choice(f"column of {path}", "file_name", columns)
    return find_caption_columns(columns, "file_name", config, str(path))


def _metadata_rows(root: str, tables: Sequence[str], columns: Sequence[Sequence[str]], stamp: str) -> Iterator[Any]:
    """Yield the rows of tables; `stamp` only serves to give changed files another key in the cache of `datasets`."""
    for table, captions in zip(tables, columns, strict=True):
        folder = posixpath.dirname(table)
        for row in table_rows(Path(root) / table, ["file_name", *captions]):
            if not isinstance(name := row.get("file_name"), str) or not name:
                raise LatentDiffError(
                    f"{Path(root) / table}: file_name={name!r} in a row; expected the path of a picture"
                )
            if "\\" in name and not (Path(root) / folder / name).exists():
                name = name.replace("\\", "/")  # written on Windows
            try:
                texts = clean_captions(row.get(column) for column in captions)
            except LatentDiffError as error:
                raise LatentDiffError(f"{Path(root) / table}: {name}: {error}") from None
            yield {"file_name": posixpath.normpath(posixpath.join(folder, name)), "captions": texts, "problem": "",
                   "remark": ""}  # fmt: skip


def _text_rows(root: str, pairs: Sequence[tuple[str, str | None]], stamp: str) -> Iterator[Any]:
    """Yield the rows of pictures and their caption files; `stamp` as above."""
    for picture, text in pairs:
        row: dict[str, Any] = {"file_name": picture, "captions": [], "problem": "", "remark": ""}
        if text is not None:
            try:
                data = (Path(root) / text).read_bytes()
                row["captions"] = lines_of(decode(data))
                if (encoding := encoding_of(data)).startswith(("utf-16", "utf-32")):
                    row["remark"] = f"caption files in {encoding.upper()}\t{text}"
            except OSError as error:
                row["problem"] = f"pictures whose caption cannot be read ({error.strerror})\t{picture} ({text})"
            except UnicodeError:
                row["problem"] = f"pictures whose caption is not UTF-8\t{picture} ({text})"
        yield row


def _generate(rows: Any, arguments: dict[str, Any], root: Path, stamp: str, left_out: LeftOut) -> Source:
    """Make a source of the rows of a generator, and note which of them are not used, and remarks on those that are."""
    table = Dataset.from_generator(rows, features=FEATURES, gen_kwargs={"root": str(root), "stamp": stamp, **arguments})
    chosen = left_out.take(table["problem"][:], table["remark"][:])
    return Source(table, FileReader(root), ("captions",), stamp, chosen)
