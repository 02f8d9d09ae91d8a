"""Tables with a column of pictures: Parquet files, and whatever Hugging Face datasets loads from the hub or a URL."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, Features, Image, Value, load_dataset  # type: ignore[import-untyped]

from ..errors import LatentDiffError, check_choice
from .captions import find_caption_columns
from .readers import ColumnReader, Rows
from .stamps import literal, stamp_of

PICTURE_NAMES = ("image", "picture", "img", "jpg", "jpeg", "png", "webp")
REMOTE_LOADERS = {".parquet": "parquet", ".tar": "webdataset", ".jsonl": "json", ".csv": "csv"}


def open_parquet(root: Path, files: Sequence[Path], image_column: str | None, caption_names: Sequence[str]) -> Rows:
    """The rows of some Parquet files with the same columns, in order.

    Raises:
        LatentDiffError: a file that is no Parquet file, or no column of pictures or captions.
    """
    counts = [_count_rows(file) for file in files]
    table = load_dataset("parquet", data_files={"train": [literal(file) for file in files]})["train"]
    names = tuple(file.relative_to(root).as_posix() for file in files)
    return _rows(table, root, (names, tuple(accumulate(counts))), stamp_of(root, files), image_column, caption_names)


def open_remote(source: str, image_column: str | None, caption_names: Sequence[str]) -> dict[str, Rows]:
    """Rows by split of a data set on the hub, `owner/name`, or of the files at a URL with a pattern.

    Raises:
        LatentDiffError: no column of pictures or captions.
    """
    loader = REMOTE_LOADERS.get(Path(source).suffix) if "://" in source else None
    splits = load_dataset(loader, data_files=source) if loader else load_dataset(source)
    return {
        str(split): _rows(
            table, Path(), ((str(split),), (len(table),)), table._fingerprint, image_column, caption_names
        )
        for split, table in splits.items()
    }


def _rows(
    table: Dataset,
    root: Path,
    files: tuple[tuple[str, ...], tuple[int, ...]],
    stamp: str,
    image_column: str | None,
    caption_names: Sequence[str],
) -> Rows:
    """A loaded table as rows; `files` are their names and the row after the last of each."""
    where = files[0][0] if len(files[0]) == 1 else f"{files[0][0]} and {len(files[0]) - 1} more"
    column = _find_image_column(table.features, image_column, where)
    captions = find_caption_columns([name for name in table.column_names if name != column], caption_names, where)
    # Undecoded: a broken picture must not raise inside datasets.
    table = table.select_columns([column, *captions]).cast_column(column, Image(decode=False))
    indices = np.arange(len(table), dtype=np.int64)
    return Rows(table, ColumnReader(column, *files, root), captions, stamp, indices)


def _find_image_column(features: Features, asked: str | None, where: str) -> str:
    if asked is not None:
        check_choice(f"image column of {where}", asked, features)
        return asked
    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    candidates = pictures or [name for name in PICTURE_NAMES if name in features and _holds_bytes(features[name])]
    if len(candidates) != 1:
        found = f"{', '.join(candidates)} all hold pictures" if candidates else "no column of pictures"
        raise LatentDiffError(f"{where}: {found} among {', '.join(features)}; name it in data.image_column")
    return candidates[0]


def _holds_bytes(feature: object) -> bool:
    """Whether a column has encoded pictures: plain bytes, or structures of bytes and path."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")


def _count_rows(file: Path) -> int:
    try:
        return int(pq.read_metadata(file).num_rows)
    except (OSError, ValueError) as error:  # pyarrow's own errors are among them
        raise LatentDiffError(f"{file}: not a sound Parquet file ({error})") from None
