"""Checkpoints that are whole or not there, whenever the process, the machine or the disk gives up.

    folder/step-00001000/   unet.safetensors, ...   tensors
                            facts.json              whatever else there is to remember
                            manifest.json           size and SHA-256 of every other file
    folder/step-00001000.old/       the earlier checkpoint of a step that is just being saved again; as good as any
    folder/.partial-step-.../       being written
    folder/.trash-step-.../         being deleted

A checkpoint is written under another name, brought to the disk, read back, and only then renamed, which happens at once
or not at all. Deleting goes the same way in reverse. One process at a time may save into a folder.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LatentDiffError
from .manifest import (
    FACTS,
    FILE_NAME,
    LARGEST_JSON,
    MANIFEST,
    Damaged,
    Entry,
    encode_manifest,
    read_facts,
    read_manifest,
    verify,
)
from .tensor_file import TensorFile

__all__ = ["Checkpoint", "Tensors", "newest_checkpoint", "save_checkpoint", "verify"]

Tensors = Mapping[str, Mapping[str, Tensor]]  # file name without suffix -> tensor name -> tensor

SUFFIX = ".safetensors"
FOLDER_NAME = re.compile(r"(step-([0-9]{8,}))(\.old)?")
LEFTOVER_NAME = re.compile(r"\.(partial|trash)-step-[0-9]{8,}(\.old)?-[0-9a-f]{32}")
SPARE = 2**20  # bytes of disk space for what is not counted: the manifest, the folder, half-filled blocks


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    step: int
    path: Path
    facts: dict[str, Any]

    def names(self) -> list[str]:
        """Names of the files with tensors, without suffix, sorted.

        Raises:
            LatentDiffError: the checkpoint was damaged or removed since.
        """
        try:
            files = read_manifest(self.path)
        except Damaged as damage:
            raise LatentDiffError(f"{self.path}: {damage}") from None
        return sorted(name.removesuffix(SUFFIX) for name in files if name != FACTS)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, on the CPU, in memory of their own.

        Raises:
            LatentDiffError: the checkpoint has no such file, or it was damaged since.
        """
        if name not in self.names():
            raise LatentDiffError(f"{self.path}: has no {name}{SUFFIX}; there are {', '.join(self.names())}")
        try:
            with safe_open(self.path / f"{name}{SUFFIX}", framework="pt", device="cpu") as file:
                # Copied, because a tensor that stays mapped to the file changes, or crashes, with the file.
                return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise LatentDiffError(f"{self.path / name}{SUFFIX}: cannot be read ({error})") from None


def save_checkpoint(
    folder: Path, step: int, tensors: Tensors, facts: Mapping[str, Any], *, keep: int = 2
) -> Checkpoint:
    """Write a checkpoint, read it back, and then delete those that are no longer needed.

    Of the step and the ones before it, the newest `keep` whole ones stay, this one among them. Damaged older ones go;
    later ones stay, as they are not of this training's past. An older one is read in full once per process, and
    afterwards only when its size or time of change differ.

    Args:
        folder: where the checkpoints lie; it is made if need be.
        step: names the checkpoint; saving a step again replaces what is there.
        tensors: of any device and memory layout; names of files from letters, digits, `_` and `-`.
        facts: anything that JSON can say; read back, tuples are lists and all keys are strings.
        keep: at least 1.

    Returns:
        The new checkpoint.

    Raises:
        LatentDiffError: the arguments cannot be saved, the disk is full or broken; older checkpoints are as they were.
    """
    if keep < 1 or step < 0:
        raise LatentDiffError(f"keep={keep}, step={step}: expected keep from 1 up and step from 0 up")
    files = _files(tensors, facts)
    target = folder / f"step-{step:08d}"
    staging = _unique(target, "partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        _check_space(folder, files)
        try:
            _stage(staging, step, files)
            _put_in_place(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _rotate(target, step, keep)
    except OSError as error:
        reason = error.strerror or error
        raise LatentDiffError(f"{folder}: the checkpoint of step {step} cannot be written ({reason})") from error
    return Checkpoint(step, target, json.loads(b"".join(files[FACTS].chunks())))


def newest_checkpoint(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a folder, every file of it read and hashed; None if there is none.

    Args:
        folder: where the checkpoints lie; it need not exist.
        report: takes one line for each newer checkpoint that is damaged.

    Raises:
        LatentDiffError: the folder cannot be listed, so nobody knows whether there are checkpoints.
    """
    damages: dict[str, str] = {}
    found = None
    for step, path in _step_folders(folder):
        damage = verify(path)
        if damage is None:
            found = Checkpoint(step, path, read_facts(path))
            break
        damages[path.name] = damage
    instead = f"using {found.path.name}" if found else "there is no whole checkpoint"
    for name, damage in damages.items():
        report(f"{name}: {damage}; {instead}")
    return found


class _Text:
    """A file of which all bytes are there already; beside TensorFile."""

    def __init__(self, content: bytes) -> None:
        self.content, self.size = content, len(content)

    def chunks(self) -> Iterable[bytes]:
        return [self.content]


def _files(tensors: Tensors, facts: Mapping[str, Any]) -> dict[str, TensorFile | _Text]:
    """File name -> contents, the manifest aside."""
    files: dict[str, TensorFile | _Text] = {f"{name}{SUFFIX}": TensorFile(group) for name, group in tensors.items()}
    for name in files:
        if not FILE_NAME.fullmatch(name):
            raise LatentDiffError(f"checkpoint file {name!r}: expected a name of letters, digits, _ and -")
    try:
        text = json.dumps(dict(facts), indent=2, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise LatentDiffError(f"facts of a checkpoint: not for JSON ({error})") from None
    if len(text) > LARGEST_JSON:
        raise LatentDiffError(f"facts of a checkpoint: {len(text)} bytes; at most {LARGEST_JSON} are allowed")
    return {**files, FACTS: _Text(text)}


def _check_space(folder: Path, files: Mapping[str, TensorFile | _Text]) -> None:
    needed = sum(file.size for file in files.values()) + SPARE
    available = shutil.disk_usage(folder).free
    if needed > available:
        raise LatentDiffError(
            f"{folder}: the disk is too full for a checkpoint: {_amount(needed)} needed, {_amount(available)} available"
        )


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _stage(staging: Path, step: int, files: Mapping[str, TensorFile | _Text]) -> None:
    """Write all files, bring them to the disk and read them back."""
    staging.mkdir()
    entries = {name: _write(staging / name, file.chunks()) for name, file in files.items()}
    _write(staging / MANIFEST, [encode_manifest(step, entries)])
    _sync_folder(staging)
    if damage := verify(staging):
        raise LatentDiffError(f"{staging.parent}: the checkpoint of step {step} reads back wrong: {damage}")


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> Entry:
    """Write and sync a file; what is hashed is what was meant to be written."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return Entry(size, digest.hexdigest())


def _put_in_place(staging: Path, target: Path) -> None:
    """Give a finished checkpoint its name; an earlier one of the same step remains findable until then."""
    old = target.with_name(f"{target.name}.old")
    if _is_ours(target) and verify(target) is None:
        _discard(old)
        os.rename(target, old)
    else:
        _discard(target)
    os.rename(staging, target)
    _sync_folder(target.parent)


def _rotate(newest: Path, step: int, keep: int) -> None:
    kept = {step}
    for other_step, path in _step_folders(newest.parent):
        if other_step > step or path == newest:
            continue
        if other_step not in kept and len(kept) < keep and verify(path, rehash=False) is None:
            kept.add(other_step)
        else:
            _discard(path)


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint, whole or not, newest first; of one step, the `.old` one last."""
    found = []
    try:
        for path in folder.iterdir():
            match = FOLDER_NAME.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found.append((int(match[2]), match[3] is None, path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LatentDiffError(f"{folder}: cannot be searched for checkpoints ({error.strerror})") from None
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _is_ours(path: Path) -> bool:
    """Whether a checkpoint was once written there: a folder of the user's is never touched, whatever its name."""
    named = bool(FOLDER_NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    return named and ((path / MANIFEST).exists() or (path / FACTS).exists())


def _discard(path: Path) -> None:
    """Delete a checkpoint, if it is one; half deleted, it no longer has its name."""
    if _is_ours(path):
        trash = _unique(path, "trash")
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what a crash left behind."""
    for path in [*folder.iterdir()]:
        if LEFTOVER_NAME.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _unique(path: Path, purpose: str) -> Path:
    return path.with_name(f".{purpose}-{path.name}-{uuid.uuid4().hex}")


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
