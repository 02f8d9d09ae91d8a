"""The broken pictures of a stage: which there are, on disk, and whether they are too many."""

from collections.abc import Mapping
from pathlib import Path

from ..data.cache import check_broken
from ..errors import LatentDiffError
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
