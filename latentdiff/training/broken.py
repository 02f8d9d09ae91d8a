"""The broken pictures of a run: which there are, said and on disk, and whether they are too many."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..data.cache import LatentCache, check_broken
from ..errors import LatentDiffError, several
from .launch import Launch


def too_many_broken(broken: Mapping[str, str], num_pictures: int, run: Launch) -> str | None:
    """Return why the run must stop if more images are broken than `data.max_broken` allows, else None."""
    try:
        check_broken(len(broken), num_pictures, run.config.data.max_broken)
    except LatentDiffError as error:
        return str(error)
    return None


def read_broken(folder: Path, run: Launch) -> dict[str, str]:
    """Return the broken pictures that this process has met so far, by name, with the reason."""
    path = folder / f"broken-{run.accelerator.process_index}.txt"
    if not path.is_file():
        return {}
    entries = (line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return {name: reason for name, _, reason in entries}


def write_broken(broken: Mapping[str, str], folder: Path, run: Launch) -> None:
    """Write down what `read_broken` returns."""
    if broken:
        lines = "".join(f"{name}\t{reason}\n" for name, reason in sorted(broken.items()))
        (folder / f"broken-{run.accelerator.process_index}.txt").write_text(lines, encoding="utf-8")


def say_what_is_broken(run: Launch, name: str, cache: LatentCache) -> None:
    """Say which pictures of a split could not be read."""
    if broken := np.flatnonzero(~cache.good).tolist():
        names = several(map(cache.source.name, broken))
        run.report(f"{run.config.data.source}: {len(broken)} of {len(cache.source)} pictures in {name} are broken and "
                   f"not used: {names}; `latentdiff data check` says why")  # fmt: skip
