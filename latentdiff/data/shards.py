"""Precomputed arrays with one row per picture, in shards on disk: written by many processes, read by memory mapping.

    <folder>/<key>/shard-00000.safetensors   SHARD rows each, unless told otherwise
    <folder>/<key>/shard-00000.json          its size and SHA-256, written last
    <folder>/<key>/complete.json             what the rows were computed from

The key is a hash of everything the rows depend on, so an array computed from other inputs lies in another folder and
cannot be used by mistake.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from ..errors import LatentDiffError

SHARD = 2048  # rows per shard
MAX_MAPPED = 256  # shards mapped at a time by a process; each keeps a file open

Arrays = dict[str, NDArray[Any]]
Progress = Callable[[int], None]  # called with the number of rows just finished
Compute = Callable[[Sequence[range], Progress], Iterator[Arrays]]  # yields the arrays of each range of rows, in order


class Processes(Protocol):
    """The processes of a run; accelerate's Accelerator is one implementation."""

    process_index: int
    num_processes: int

    def wait_for_everyone(self) -> None:
        """Block until all processes have called this."""


class SingleProcess:
    """A run of a single process."""

    process_index, num_processes = 0, 1

    def wait_for_everyone(self) -> None:
        """Return at once."""


def digest(value: Mapping[str, Any]) -> str:
    """Return 32 hex digits that identify a JSON-serializable mapping."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shards:
    """Rows 0 ... num_rows - 1 of named arrays on disk; `shards["name", row]` copies one of them into memory.

    Rows can be read after `build`, which computes what is missing. A shard that is truncated, altered or lost fails its
    checksum and is computed again.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any], num_rows: int, shard_rows: int = SHARD) -> None:
        self.inputs, self.num_rows, self.shard_rows = inputs, num_rows, shard_rows
        self.num_shards = -(-num_rows // shard_rows)
        self.folder = folder / digest(inputs)

    def is_complete(self) -> bool:
        """Whether all shards have been written; `build` finds out whether they are still intact."""
        return (self.folder / "complete.json").is_file()

    def build(self, compute: Compute, processes: Processes, label: str | None = None) -> None:
        """Compute the missing shards, shared among all processes, so that every row can be read.

        `compute` gets the missing ranges of rows and yields the arrays of each, with rows as the first dimension; while
        it works, the first process shows a progress bar with the label. Raises LatentDiffError if a shard cannot be
        written.
        """
        shards = {number: range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.num_rows))
                  for number in range(processes.process_index, self.num_shards, processes.num_processes)}  # fmt: skip
        hidden = label is None or processes.process_index > 0 or self.is_complete()
        with tqdm(total=self.num_rows, desc=label, unit="", disable=hidden) as bar:

            def progress(rows: int) -> None:
                bar.update(min(rows * processes.num_processes, self.num_rows - int(bar.n)))  # assumes equal speed

            wanting = {number: rows for number, rows in shards.items() if not self._is_intact(number)}
            progress(sum(map(len, shards.values())) - sum(map(len, wanting.values())))
            computed = compute(list(wanting.values()), progress)
            for number in wanting:
                self._write(number, next(computed))  # kept under no name: a shard may be large
        processes.wait_for_everyone()
        if missing := [number for number in range(self.num_shards) if not self._checksum_path(number).is_file()]:
            raise LatentDiffError(f"{self.folder}: shard {missing[0]} is missing; another process could not write it")
        if processes.process_index == 0:
            text = json.dumps({"rows": self.num_rows, "facts": self.inputs}, indent=2, sort_keys=True)
            (self.folder / "complete.json").write_text(text + "\n", encoding="utf-8")
        _open_shard.cache_clear()  # drop mappings of shards that were computed again
        processes.wait_for_everyone()

    def __getitem__(self, what: tuple[str, int]) -> NDArray[Any]:
        name, row = what
        number, within = divmod(row, self.shard_rows)
        return _open_shard(self._path(number)).get_slice(name)[within]

    def column(self, name: str) -> NDArray[Any]:
        """Read all rows of an array into memory."""
        return np.concatenate([_open_shard(self._path(number)).get_tensor(name) for number in range(self.num_shards)])

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _checksum_path(self, number: int) -> Path:
        return self._path(number).with_suffix(".json")

    def _is_intact(self, number: int) -> bool:
        try:
            checksum = json.loads(self._checksum_path(number).read_text(encoding="utf-8"))
            path = self._path(number)
            return bool(path.stat().st_size == checksum["bytes"] and file_digest(path) == checksum["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _write(self, number: int, arrays: Arrays) -> None:
        path, partial = self._path(number), self._path(number).with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._checksum_path(number).unlink(missing_ok=True)
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)
            checksum = {"bytes": partial.stat().st_size, "sha256": file_digest(partial)}
            os.replace(partial, path)
            partial.write_text(json.dumps(checksum), encoding="utf-8")
            os.replace(partial, self._checksum_path(number))
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise LatentDiffError(f"{path}: cannot be written ({error})") from error


@lru_cache(maxsize=MAX_MAPPED)
def _open_shard(path: Path) -> Any:
    """Memory-map a shard: only the rows that are read take up memory."""
    return safe_open(path, "np")


def remove_others(folder: Path, keep: set[str]) -> None:
    """Delete the arrays in `folder` whose keys are not in `keep`."""
    for path in folder.glob("?" * 32):
        if path.is_dir() and path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)


def changed_inputs(folder: Path, inputs: Mapping[str, Any]) -> list[str]:
    """Return which inputs differ from those of the array in `folder`; empty if there is none."""
    for path in sorted(folder.glob("*/complete.json")):
        try:
            previous = json.loads(path.read_text(encoding="utf-8"))["facts"]
        except (OSError, ValueError, KeyError):
            continue
        return [name for name in inputs if previous.get(name) != inputs[name]]
    return []
