"""A short text that changes when files do."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable
from pathlib import Path


def stamp_of(root: Path, files: Iterable[Path]) -> str:
    """Hash over paths relative to `root`, sizes and times of change (ns); a missing file counts as missing."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}\0{_stat(file)}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _stat(file: Path) -> str:
    try:
        stat = file.stat()
    except (OSError, ValueError):
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}"


def literal(path: Path) -> str:
    """A path for datasets, which takes [ ] * ? in it for a pattern."""
    return glob.escape(str(path))
