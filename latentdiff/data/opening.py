"""From what `data.source` says to rows by split: which kind of source it is, and one clear error if it is none."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import config as datasets_config  # type: ignore[import-untyped]
from datasets.utils.logging import (  # type: ignore[import-untyped]
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from ..assets import pictures_folder
from ..errors import LatentDiffError
from .folders import find_metadata, open_metadata, open_text_folder
from .readers import Rows
from .splits import split_of_file
from .tables import open_parquet, open_remote
from .tars import open_tars

if TYPE_CHECKING:
    from ..sections import DataConfig

SHARDS = (".parquet", ".tar")


def open_splits(config: DataConfig) -> dict[str, Rows]:
    """Rows by split; "" holds those in none.

    Raises:
        LatentDiffError: nothing there, nothing of use in it, or datasets cannot load it.
    """
    try:
        with _quietly():
            return _open(config)
    except LatentDiffError:
        raise
    except Exception as error:  # datasets has dozens, and wraps them in each other
        raise _explained(config.source, error) from error


def _open(config: DataConfig) -> dict[str, Rows]:
    source = config.source
    path = Path(pictures_folder(source)).expanduser()
    asked = (config.train_split, config.validation_split)
    if "://" not in source and path.is_dir():
        return _open_folder(path.absolute(), config, asked)
    if "://" not in source and (path.is_file() or glob.has_magic(source)):
        return _open_files(path, config, asked)
    if "://" in source or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return open_remote(source, config.image_column, config.caption_columns)
    raise LatentDiffError(f"data.source={source!r}: no such file or folder")


def _open_folder(root: Path, config: DataConfig, asked: Sequence[str]) -> dict[str, Rows]:
    """Metadata goes first, for it says what the pictures are; then shards; then pictures with .txt files."""
    if tables := find_metadata(root, asked):
        return open_metadata(root, tables, config.caption_columns, asked)
    shards = sorted(path for path in root.rglob("*") if path.suffix in SHARDS and path.is_file())
    if shards:
        return _open_shards(root, shards, config, asked)
    return open_text_folder(root, asked)


def _open_files(pattern: Path, config: DataConfig, asked: Sequence[str]) -> dict[str, Rows]:
    """One file, or all that fit a pattern; names are relative to the last folder without a pattern in it."""
    files = [pattern] if pattern.is_file() else sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    shards = [file.absolute() for file in files if file.suffix in SHARDS and file.is_file()]
    if not shards:
        raise LatentDiffError(f"data.source={config.source!r}: no {' or '.join(SHARDS)} files there")
    root = pattern.parent
    while glob.has_magic(str(root)) and not root.is_dir():
        root = root.parent
    return _open_shards(root.absolute(), shards, config, asked)


def _open_shards(root: Path, shards: Sequence[Path], config: DataConfig, asked: Sequence[str]) -> dict[str, Rows]:
    if len(kinds := {shard.suffix for shard in shards}) > 1:
        raise LatentDiffError(
            f"data.source={config.source!r}: both {' and '.join(sorted(kinds))} files; expected one kind"
        )
    splits: dict[str, list[Path]] = {}
    for shard in shards:
        splits.setdefault(split_of_file(shard.relative_to(root).as_posix(), asked), []).append(shard)
    if kinds == {".tar"}:
        return {split: open_tars(root, files, config.caption_columns) for split, files in splits.items()}
    return {split: open_parquet(root, files, config.image_column, config.caption_columns)
            for split, files in splits.items()}  # fmt: skip


@contextmanager
def _quietly() -> Iterator[None]:
    """Without datasets' bars, and without its telling a server which loader is used, local files' too."""
    shown, counts = is_progress_bar_enabled(), datasets_config.HF_UPDATE_DOWNLOAD_COUNTS
    disable_progress_bar()
    datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if shown:
            enable_progress_bar()


def _explained(source: str, error: BaseException) -> LatentDiffError:
    """The cause in one line; a LatentDiffError raised while datasets built its table as it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, LatentDiffError):
        return error
    where = f"data.source={source!r}"
    if isinstance(error, ConnectionError) or "ffline" in str(error):
        where += ": no such folder here, and it cannot be fetched"
    message = " ".join(str(error).split())
    return LatentDiffError(f"{where}: cannot be loaded ({type(error).__name__}: {message[:300]})")
