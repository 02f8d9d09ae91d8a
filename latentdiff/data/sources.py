"""The two splits of `data.source`, which is a folder, Parquet files, tar shards or a dataset on the hub.

Folders with one file per picture are opened by `folders`, tables of pictures by `tables`, tar shards by `tars`; each
returns `Source`s, which are defined in `readers`.
"""

import glob
import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from datasets import config as datasets_config  # type: ignore[import-untyped]
from datasets.utils import logging as datasets_logging  # type: ignore[import-untyped]

from ..assets import pictures_folder
from ..errors import LatentDiffError, one_line, reraise_as
from ..sections import DataConfig
from .folders import open_metadata, open_text_folder, split_of_file
from .left_out import LeftOut
from .listing import SHARDS, list_folder
from .pictures import EXTENSIONS
from .readers import Source
from .tables import holds_pictures, open_parquet, open_remote
from .tars import open_tars
from .texts import decode, lines_of

logger = logging.getLogger(__name__)

__all__ = ["Source", "hold_out", "open_source", "open_splits", "read_quarantine"]


def open_source(config: DataConfig, left_out: LeftOut | None = None) -> tuple[Source, Source]:
    """Open the training pictures and the held-out ones, without those in quarantine.

    What the source has and these two do not is added to `left_out`, or logged if there is none.

    Raises:
        LatentDiffError: the source, a column or the quarantine file is missing, or a split has no pictures or captions.
    """
    if left_out is None:
        sources = open_source(config, left_out := LeftOut())
        for line in left_out.lines():
            logger.warning("%s: %s", config.source, line)
        return sources
    splits = open_splits(config, left_out)
    if (train := splits.get(config.train_split, splits.get(""))) is None:
        found = ", ".join(sorted(splits)) or "none"
        raise LatentDiffError(f"{config.source}: no split data.train_split={config.train_split!r}; found: {found}")
    for split, source in splits.items():
        if source is not train and split != config.validation_split:
            which = f"the split {split!r}, which is not used" if split else "no split"
            left_out.add(f"pictures in {which}", source.names())
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


def open_splits(config: DataConfig, left_out: LeftOut) -> dict[str, Source]:
    """Open all pictures by split, without those in quarantine; "" holds those that are in none.

    Raises LatentDiffError if the source, a column or the quarantine file is missing.
    """
    with _quiet_datasets(config.source):
        splits = _open_splits(config, left_out)
    if config.quarantine is None:
        return splits
    bad = read_quarantine(config.quarantine)
    left_out.add("pictures in data.quarantine", bad.intersection(chain(*(each.names() for each in splits.values()))))
    return {name: source.without(bad) for name, source in splits.items()}


def hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """Split a source into (the rest, about `share` of it); raises LatentDiffError if it has fewer than two pictures.

    The choice is a hash of the name, so it does not depend on which other pictures there are, or on their order.
    Pictures without a caption are not held out while others have one, as they would say nothing about prompts.
    """
    if len(source) < 2:
        raise LatentDiffError(f"number of pictures is {len(source)}: too few to hold one out for validation")
    digests = (hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest() for name in source.names())
    keys = np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])
    captioned = np.array([bool(captions) for captions in source.all_captions()])
    if captioned.any():
        keys[~captioned] = 1.0
    held = keys < share
    held[keys.argmin()] = True  # so that neither part is empty
    held[np.where(captioned, keys, -1.0).argmax() if captioned.sum() > 1 else keys.argmax()] = False
    return source.select(np.flatnonzero(~held)), source.select(np.flatnonzero(held))


def read_quarantine(path: str | Path) -> set[str]:
    """Read picture names from a file with one `name<TAB>reason` per line."""
    with reraise_as(LatentDiffError, f"data.quarantine={str(path)!r}: cannot be read", OSError, UnicodeError):
        text = decode(Path(path).read_bytes())
    return {line.partition("\t")[0] for line in lines_of(text) if line.strip()}


def _open_splits(config: DataConfig, left_out: LeftOut) -> dict[str, Source]:
    source = config.source
    if "://" in source:
        return open_remote(config)
    path = Path(pictures_folder(source))
    if path.is_dir():
        return _open_folder(path.absolute(), config, left_out)
    if path.is_file() or glob.has_magic(source):
        return _open_files(path, config, left_out)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return open_remote(config)
    raise LatentDiffError(f"data.source={one_line(repr(source))}: no such file or folder")


def _open_folder(root: Path, config: DataConfig, left_out: LeftOut) -> dict[str, Source]:
    """Open a folder by its tables of pictures, or else its pictures with .txt files, or else its shards."""
    listing = list_folder(root, left_out)
    if listing.tables:
        return open_metadata(listing, config, left_out)
    if listing.shards and not listing.caption_files:
        left_out.add("pictures without captions beside Parquet and tar files", listing.pictures)
        return _open_shards(root, [root / name for name in listing.shards], config, left_out)
    if listing.pictures:
        return open_text_folder(listing, config, left_out)
    raise LatentDiffError("; ".join([f"{root}: contains neither pictures ({', '.join(EXTENSIONS)}) nor Parquet or tar "
                                     "files", *left_out.lines()]))  # fmt: skip


def _open_files(pattern: Path, config: DataConfig, left_out: LeftOut) -> dict[str, Source]:
    """Open one file, or all that match a pattern; names are relative to the last folder without wildcards."""
    files = [pattern] if pattern.is_file() else sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    shards = [file.absolute() for file in files if file.suffix.lower() in SHARDS and file.is_file()]
    if not shards:
        raise LatentDiffError(f"data.source={config.source!r}: no {' or '.join(SHARDS)} files found")
    left_out.add("files that are neither Parquet nor tar", (str(f) for f in files if f.absolute() not in shards))
    root = pattern.parent
    while glob.has_magic(str(root)) and not root.is_dir():
        root = root.parent
    return _open_shards(root.absolute(), shards, config, left_out)


def _open_shards(root: Path, shards: Sequence[Path], config: DataConfig, left_out: LeftOut) -> dict[str, Source]:
    kinds = sorted({shard.suffix.lower() for shard in shards})
    if len(kinds) > 1:
        raise LatentDiffError(f"data.source={config.source!r} has both {' and '.join(kinds)} files; expected one kind")
    if kinds == [".parquet"] and len(shards) > 1:
        full = [shard for shard in shards if holds_pictures(shard, config)]
        left_out.add("tables without pictures", (str(shard.relative_to(root)) for shard in shards if shard not in full))
        shards = full or shards
    splits: dict[str, list[Path]] = {}
    for shard in shards:
        splits.setdefault(split_of_file(shard.relative_to(root).as_posix(), config), []).append(shard)
    if kinds == [".tar"]:
        return {split: open_tars(root, files, config, left_out) for split, files in splits.items()}
    return {split: open_parquet(root, files, config) for split, files in splits.items()}


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


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
        if isinstance(cause, OSError) and not _is_writable(folder := Path(datasets_config.HF_DATASETS_CACHE)):
            raise LatentDiffError(f"{folder}: cannot be written ({cause.strerror}); `datasets` keeps its tables there, "
                                  "so set HF_DATASETS_CACHE, or HF_HOME, to a folder that can") from error  # fmt: skip
        where = f"data.source={one_line(repr(source))}"
        if isinstance(cause, ConnectionError) or "ffline" in str(cause):
            where += ": no such local folder, and it cannot be fetched"
        message = " ".join(str(cause).split())[:300]
        raise LatentDiffError(f"{where}: cannot be loaded ({type(cause).__name__}: {message})") from error
    finally:
        datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if shown:
            datasets_logging.enable_progress_bar()
