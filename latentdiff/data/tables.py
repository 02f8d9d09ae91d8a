"""Tables with a column of pictures: Parquet files, and whatever Hugging Face `datasets` loads from the hub or a URL.

Also finds the caption columns of any table.
"""

import glob
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, Features, Image, Value, load_dataset  # type: ignore[import-untyped]

from ..errors import LatentDiffError, check_choice, reraise_as
from ..sections import DataConfig
from .readers import ColumnReader, Source, stamp_of

CAPTION_NAMES = ("text", "caption", "captions", "txt", "prompt")
PICTURE_NAMES = ("image", "picture", "img", "jpg", "jpeg", "png", "webp")
LOADERS = {".parquet": "parquet", ".tar": "webdataset", ".jsonl": "json", ".csv": "csv"}


def holds_pictures(file: Path, config: DataConfig) -> bool:
    """Whether a Parquet file has a column of pictures, by its schema alone."""
    with reraise_as(LatentDiffError, f"{file}: not a valid Parquet file", OSError, ValueError):
        features = Features.from_arrow_schema(pq.read_schema(file))
    return config.image_column in features if config.image_column else bool(_picture_columns(features))


def open_parquet(root: Path, files: Sequence[Path], config: DataConfig) -> Source:
    """Open Parquet files with the same columns, in order, as one source."""
    counts = []
    for file in files:
        with reraise_as(LatentDiffError, f"{file}: not a valid Parquet file", OSError, ValueError):
            counts.append(int(pq.read_metadata(file).num_rows))
    names = tuple(file.relative_to(root).as_posix() for file in files)
    return _open(load_table(files), root, names, tuple(accumulate(counts)), stamp_of(root, files), config)


def open_remote(config: DataConfig) -> dict[str, Source]:
    """Open a dataset on the hub (`owner/name`), or the files that match a URL pattern, as sources by split."""
    loader = LOADERS.get(Path(config.source).suffix) if "://" in config.source else None
    splits = load_dataset(loader, data_files=config.source) if loader else load_dataset(config.source)
    return {
        str(split): _open(table, Path(), (str(split),), (len(table),), table._fingerprint, config)
        for split, table in splits.items()
    }


def load_table(files: Sequence[Path]) -> Dataset:
    """Load Parquet files, in order, as one table."""
    escaped = [glob.escape(str(file)) for file in files]  # `datasets` expands [ ] * ? in paths
    return load_dataset("parquet", data_files={"train": escaped})["train"]


def find_caption_columns(names: Sequence[str], picture_column: str, config: DataConfig, where: str) -> tuple[str, ...]:
    """Return the caption columns named in the config, or else the first with a usual name; raises if there is none."""
    columns = [name for name in names if name != picture_column]
    for name in config.caption_columns:
        check_choice(f"caption column of {where}", name, columns)
    found = config.caption_columns or tuple(name for name in CAPTION_NAMES if name in columns)[:1]
    if not found:
        raise LatentDiffError(
            f"{where}: no caption column among {', '.join(columns)}; set data.caption_columns "
            f"or rename a column to {', '.join(CAPTION_NAMES[:-1])} or {CAPTION_NAMES[-1]}"
        )
    return found


def _open(
    table: Dataset, root: Path, files: tuple[str, ...], ends: tuple[int, ...], stamp: str, config: DataConfig
) -> Source:
    """Turn a loaded table into a source; `files` and `ends` are those of `ColumnReader`."""
    where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    column = _find_image_column(table.features, config.image_column, where)
    captions = find_caption_columns(table.column_names, column, config, where)
    # Not decoded: a broken picture must not raise inside `datasets`.
    table = table.select_columns([column, *captions]).cast_column(column, Image(decode=False))
    return Source(table, ColumnReader(column, files, ends, root), captions, stamp)


def _find_image_column(features: Features, requested: str | None, where: str) -> str:
    if requested is not None:
        check_choice(f"image column of {where}", requested, features)
        return requested
    if len(candidates := _picture_columns(features)) != 1:
        found = f"several picture columns ({', '.join(candidates)})" if candidates else "no picture column"
        raise LatentDiffError(f"{where}: {found} among {', '.join(features)}; set data.image_column")
    return candidates[0]


def _picture_columns(features: Features) -> list[str]:
    pictures: list[str] = [name for name, feature in features.items() if isinstance(feature, Image)]
    return pictures or [name for name in PICTURE_NAMES if name in features and _holds_bytes(features[name])]


def _holds_bytes(feature: object) -> bool:
    """Return whether a column holds encoded pictures: plain bytes or {bytes, path} structs."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
