"""The two splits of `data.source`, which is a folder, Parquet files, tar shards or a dataset on the hub.

Folders with one file per picture are opened by `folders`, tables of pictures by `tables`, tar shards by `tars`; each
returns `Source`s, which are defined in `readers`.
"""

import glob
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from datasets import config as datasets_config  # type: ignore[import-untyped]
from datasets.utils import logging as datasets_logging  # type: ignore[import-untyped]

from ..assets import pictures_folder
from ..errors import LatentDiffError, reraise_as
from ..sections import DataConfig
from .folders import open_metadata, open_text_folder, split_of_file
from .readers import Source
from .tables import open_parquet, open_remote
from .tars import open_tars

__all__ = ["Source", "hold_out", "open_source", "read_quarantine"]

SHARDS = (".parquet", ".tar")


def open_source(config: DataConfig) -> tuple[Source, Source]:
    """Open the training pictures and the held-out ones, without those in quarantine.

    Raises:
        LatentDiffError: the source, a column or the quarantine file is missing, or a split has no pictures or captions.
    """
    with _quiet_datasets(config.source):
        splits = _open_splits(config)
    if config.quarantine is not None:
        bad = read_quarantine(config.quarantine)
        splits = {name: source.without(bad) for name, source in splits.items()}
    if (train := splits.get(config.train_split, splits.get(""))) is None:
        found = ", ".join(sorted(splits)) or "none"
        raise LatentDiffError(f"{config.source}: no split data.train_split={config.train_split!r}; found: {found}")
    if (validation := splits.get(config.validation_split)) is None:
        train, validation = hold_out(train, config.validation_share)
    for split, source in ((config.train_split, train), (config.validation_split, validation)):
        if not len(source):
            raise LatentDiffError(f"{config.source}: split {split!r} has no pictures")
        if not any(source.all_captions()):
            raise LatentDiffError(
                f"{config.source}: none of the {len(source)} pictures in split {split!r} has a caption; "
                "put cat.txt beside cat.png, or add a metadata.jsonl"
            )
    return train, validation


def hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """Split a source into (the rest, about `share` of it); raises LatentDiffError if it has fewer than two pictures.

    The choice is a hash of the name, so it does not depend on which other pictures there are, or on their order.
    """
    if len(source) < 2:
        raise LatentDiffError(f"number of pictures is {len(source)}: too few to hold one out for validation")
    digests = (hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest() for name in source.names())
    keys = np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])
    held = keys < share
    held[keys.argmin()], held[keys.argmax()] = True, False  # so that neither part is empty
    return source.select(np.flatnonzero(~held)), source.select(np.flatnonzero(held))


def read_quarantine(path: str | Path) -> set[str]:
    """Read picture names from a file with one `name<TAB>reason` per line."""
    with reraise_as(LatentDiffError, f"data.quarantine={str(path)!r}: cannot be read", OSError, UnicodeDecodeError):
        text = Path(path).read_text(encoding="utf-8")
    return {line.partition("\t")[0] for line in text.split("\n") if line.strip()}


def _open_splits(config: DataConfig) -> dict[str, Source]:
    """Open a source of any kind, by split; "" holds the pictures that are in none."""
    source = config.source
    if "://" in source:
        return open_remote(config)
    path = Path(pictures_folder(source)).expanduser()
    if path.is_dir():
        return _open_folder(path.absolute(), config)
    if path.is_file() or glob.has_magic(source):
        return _open_files(path, config)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return open_remote(config)
    raise LatentDiffError(f"data.source={source!r}: no such file or folder")


def _open_folder(root: Path, config: DataConfig) -> dict[str, Source]:
    """Open a folder; metadata takes precedence over shards, and shards over pictures with .txt files."""
    if (splits := open_metadata(root, config)) is not None:
        return splits
    if shards := sorted(path for path in root.rglob("*") if path.suffix in SHARDS and path.is_file()):
        return _open_shards(root, shards, config)
    return open_text_folder(root, config)


def _open_files(pattern: Path, config: DataConfig) -> dict[str, Source]:
    """Open one file, or all that match a pattern; names are relative to the last folder without wildcards."""
    files = [pattern] if pattern.is_file() else sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    shards = [file.absolute() for file in files if file.suffix in SHARDS and file.is_file()]
    if not shards:
        raise LatentDiffError(f"data.source={config.source!r}: no {' or '.join(SHARDS)} files found")
    root = pattern.parent
    while glob.has_magic(str(root)) and not root.is_dir():
        root = root.parent
    return _open_shards(root.absolute(), shards, config)


def _open_shards(root: Path, shards: Sequence[Path], config: DataConfig) -> dict[str, Source]:
    kinds = sorted({shard.suffix for shard in shards})
    if len(kinds) > 1:
        raise LatentDiffError(f"data.source={config.source!r} has both {' and '.join(kinds)} files; expected one kind")
    splits: dict[str, list[Path]] = {}
    for shard in shards:
        splits.setdefault(split_of_file(shard.relative_to(root).as_posix(), config), []).append(shard)
    open_shards = open_tars if kinds == [".tar"] else open_parquet
    return {split: open_shards(root, files, config) for split, files in splits.items()}


@contextmanager
def _quiet_datasets(source: str) -> Iterator[None]:
    """Turn off the progress bars and usage reports of `datasets`, and reduce its errors to one line."""
    shown, counts = datasets_logging.is_progress_bar_enabled(), datasets_config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets_logging.disable_progress_bar()
    datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    except Exception as error:  # `datasets` raises dozens of kinds, nested; our own pass unchanged
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, LatentDiffError):
            cause = cause.__cause__
        if isinstance(cause, LatentDiffError):
            raise cause from None
        where = f"data.source={source!r}"
        if isinstance(cause, ConnectionError) or "ffline" in str(cause):
            where += ": no such local folder, and it cannot be fetched"
        message = " ".join(str(cause).split())[:300]
        raise LatentDiffError(f"{where}: cannot be loaded ({type(cause).__name__}: {message})") from error
    finally:
        datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if shown:
            datasets_logging.enable_progress_bar()
