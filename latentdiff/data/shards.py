"""Arrays of one row a picture, computed once: shards on disk, written by many processes together, mapped to be read.

    <folder>/<key>/shard-00000.safetensors   SHARD rows each
    <folder>/<key>/shard-00000.json          its size and SHA-256, written last
    <folder>/<key>/complete.json             what was computed, from what

The key is a hash of everything the rows depend on, so an array computed from something else is another folder: it
cannot be used by mistake.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import LatentDiffError

SHARD = 2048  # rows
MAPPED = 256  # shards at a time, of all arrays of a process: each holds a file open

Arrays = dict[str, NDArray[Any]]
Progress = Callable[[int], None]  # told a number of rows that are done


class Processes(Protocol):
    """The processes of a run, as accelerate's Accelerator shows them."""

    process_index: int
    num_processes: int

    def wait_for_everyone(self) -> None:
        """A barrier."""


class SingleProcess:
    """One process."""

    process_index, num_processes = 0, 1

    def wait_for_everyone(self) -> None:
        """Nobody to wait for."""


def digest(facts: Mapping[str, Any]) -> str:
    """32 hex digits that stand for the facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shards:
    """Rows 0 ... num_rows - 1 of named arrays, on disk; `rows["name", index]` copies one into memory.

    It is opened by `build`, which computes what is missing. A shard that was cut short, changed or lost is noticed by
    its hash and computed again.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], num_rows: int) -> None:
        self.facts, self.num_rows, self.num_shards = facts, num_rows, -(-num_rows // SHARD)
        self.folder = folder / digest(facts)

    def build(
        self, compute: Callable[[range, Progress], Arrays], processes: Processes, progress: Progress = lambda _: None
    ) -> None:
        """Compute the missing shards, all processes together; afterwards all rows can be read.

        Args:
            compute: arrays for a range of rows, first dimension the rows; tells its progress.
            processes: who shares the work.
            progress: told the rows that this process has done.

        Raises:
            LatentDiffError: the folder cannot be written, or a shard is still not whole afterwards.
        """
        for number in range(processes.process_index, self.num_shards, processes.num_processes):
            rows = range(number * SHARD, min((number + 1) * SHARD, self.num_rows))
            if self._is_whole(number):
                progress(len(rows))
            else:
                self._write(number, compute(rows, progress))
        processes.wait_for_everyone()
        if missing := [number for number in range(self.num_shards) if not self._seal(number).is_file()]:
            raise LatentDiffError(f"{self.folder}: shard {missing[0]} is missing; another process could not write it")
        if processes.process_index == 0:
            text = json.dumps({"rows": self.num_rows, "facts": self.facts}, indent=2, sort_keys=True)
            (self.folder / "complete.json").write_text(text + "\n", encoding="utf-8")
        _mapped.cache_clear()  # a shard that was mapped before it was computed again
        processes.wait_for_everyone()

    def __getitem__(self, what: tuple[str, int]) -> NDArray[Any]:
        name, row = what
        number, within = divmod(row, SHARD)
        return _mapped(self._path(number)).get_slice(name)[within]

    def column(self, name: str) -> NDArray[Any]:
        """A small array whole."""
        return np.concatenate([_mapped(self._path(number)).get_tensor(name) for number in range(self.num_shards)])

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _seal(self, number: int) -> Path:
        return self._path(number).with_suffix(".json")

    def _is_whole(self, number: int) -> bool:
        try:
            seal = json.loads(self._seal(number).read_text(encoding="utf-8"))
            path = self._path(number)
            return bool(path.stat().st_size == seal["bytes"] and file_digest(path) == seal["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _write(self, number: int, arrays: Arrays) -> None:
        path, partial = self._path(number), self._path(number).with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._seal(number).unlink(missing_ok=True)
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)
            seal = {"bytes": partial.stat().st_size, "sha256": file_digest(partial)}
            os.replace(partial, path)
            partial.write_text(json.dumps(seal), encoding="utf-8")
            os.replace(partial, self._seal(number))
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise LatentDiffError(f"{path}: cannot be written ({error})") from error


@lru_cache(maxsize=MAPPED)
def _mapped(path: Path) -> Any:
    """A shard, mapped into memory, of which only the rows that are read take any."""
    return safe_open(path, "np")


def remove_others(folder: Path, keep: set[str]) -> None:
    """Delete the arrays in `folder` that were computed from something else."""
    for path in folder.glob("?" * 32):
        if path.is_dir() and path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)


def differences(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """Which facts an array that lies in `folder` was computed from otherwise; empty where there is none."""
    for path in sorted(folder.glob("*/complete.json")):
        try:
            former = json.loads(path.read_text(encoding="utf-8"))["facts"]
        except (OSError, ValueError, KeyError):
            continue
        return [name for name in facts if former.get(name) != facts[name]]
    return []
