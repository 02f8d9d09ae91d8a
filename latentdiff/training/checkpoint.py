"""Crash-safe checkpoints: a checkpoint is complete or absent, even if the process, machine or disk fails midway.

    folder/step-00001000/       unet.safetensors, ...   tensors
                                facts.json              metadata
                                manifest.json           size and SHA-256 of every other file
    folder/step-00001000.old/   previous checkpoint of a step that is being saved again; equally valid
    folder/.partial-step-.../   being written
    folder/.trash-step-.../     being deleted

A checkpoint is written under a temporary name, synced, read back and then renamed, which is atomic. Deleting one starts
with a rename, too. Only one process at a time may save into a folder.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LatentDiffError
from .manifest import (
    FILE_NAME,
    MANIFEST,
    MAX_JSON_BYTES,
    METADATA,
    DamagedCheckpoint,
    Entry,
    encode_manifest,
    read_manifest,
    read_metadata,
    verify,
)
from .tensor_file import TensorFile

__all__ = ["Checkpoint", "Tensors", "discard", "intact_metadata", "newest_checkpoint", "save_checkpoint",
           "step_folders", "sync_folder", "verify"]  # fmt: skip

Tensors = Mapping[str, Mapping[str, Tensor]]  # file name without suffix -> tensor name -> tensor

SUFFIX = ".safetensors"
FOLDER_NAME = re.compile(r"(step-([0-9]{8,}))(\.old)?")
LEFTOVER_NAME = re.compile(r"\.(partial|trash)-step-[0-9]{8,}(\.old)?-[0-9a-f]{32}")
DISK_MARGIN = 2**20  # bytes for the manifest, directory entries and partially filled blocks


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed verification."""

    step: int
    path: Path
    metadata: dict[str, Any]

    def names(self) -> list[str]:
        """Return the sorted names of the tensor files, without suffix."""
        try:
            files = read_manifest(self.path)
        except DamagedCheckpoint as damage:
            raise LatentDiffError(f"{self.path}: {damage}") from None
        return sorted(name.removesuffix(SUFFIX) for name in files if name != METADATA)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Load the tensors of one file to the CPU; raise `LatentDiffError` if it is missing or damaged."""
        if name not in self.names():
            raise LatentDiffError(f"{self.path}: there is no {name}{SUFFIX}; available: {', '.join(self.names())}")
        try:
            with safe_open(self.path / f"{name}{SUFFIX}", framework="pt", device="cpu") as file:
                # Cloned: a memory-mapped tensor would change, or crash the process, when the file does.
                return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise LatentDiffError(f"{self.path / name}{SUFFIX}: cannot be read ({error})") from None


def save_checkpoint(
    folder: Path, step: int, tensors: Tensors, metadata: Mapping[str, Any], *, keep: int | None = 2,
    pinned: Collection[int] = (),
) -> Checkpoint:  # fmt: skip
    """Write a checkpoint, verify it by reading it back, then delete the ones that are no longer needed.

    Including this one, the newest `keep` intact checkpoints up to `step` stay; other earlier ones are deleted. Later
    ones are left alone, as they are not part of this run's past. An older checkpoint is read in full once per process,
    and again only if its size or ctime has changed.

    Args:
        folder: parent of the checkpoints; created if it does not exist.
        step: names the checkpoint; saving a step again replaces it.
        tensors: on any device, in any memory layout; file names may contain letters, digits, `_` and `-`.
        metadata: JSON-serializable; read back, tuples become lists and keys become strings.
        keep: at least 1; None: all, and none is read.
        pinned: steps whose checkpoints stay in any case, and are not counted.

    Raises:
        LatentDiffError: an argument is invalid or the disk is full or broken; older checkpoints are left as they were.
    """
    if (keep is not None and keep < 1) or step < 0:
        raise LatentDiffError(f"keep={keep}, step={step}: keep must be at least 1 and step at least 0")
    files = _files(tensors, metadata)
    target = folder / f"step-{step:08d}"
    staging = _temporary_path(target, "partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        _check_space(folder, files)
        try:
            _stage(staging, step, files)
            _publish(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if keep is None:
            discard(_old(target))
        else:
            _rotate(target, step, keep, pinned)
    except OSError as error:
        reason = error.strerror or error
        raise LatentDiffError(f"{folder}: the checkpoint of step {step} cannot be written ({reason})") from error
    return Checkpoint(step, target, json.loads(b"".join(files[METADATA].chunks())))


def newest_checkpoint(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest intact checkpoint, with every file read and hashed, or None if there is none.

    Args:
        folder: parent of the checkpoints; need not exist.
        report: called with one line for each newer checkpoint that is damaged.

    Raises:
        LatentDiffError: the folder cannot be listed.
    """
    damages: dict[str, str] = {}
    found = None
    for step, path in step_folders(folder):
        damage = verify(path)
        if damage is None:
            found = Checkpoint(step, path, read_metadata(path))
            break
        damages[path.name] = damage
    instead = f"using {found.path.name}" if found else "there is no intact checkpoint"
    for name, damage in damages.items():
        report(f"{name}: {damage}; {instead}")
    return found


class _Bytes:
    """In-memory counterpart of `TensorFile`."""

    def __init__(self, content: bytes) -> None:
        self.content, self.size = content, len(content)

    def chunks(self) -> Iterable[bytes]:
        return [self.content]


def _files(tensors: Tensors, metadata: Mapping[str, Any]) -> dict[str, TensorFile | _Bytes]:
    """Contents of every file but the manifest, by file name."""
    files: dict[str, TensorFile | _Bytes] = {f"{name}{SUFFIX}": TensorFile(group) for name, group in tensors.items()}
    for name in files:
        if not FILE_NAME.fullmatch(name):
            raise LatentDiffError(f"checkpoint file {name!r}: the name may contain only letters, digits, _ and -")
    try:
        text = json.dumps(dict(metadata), indent=2, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise LatentDiffError(f"checkpoint metadata is not JSON-serializable ({error})") from None
    if len(text) > MAX_JSON_BYTES:
        raise LatentDiffError(f"checkpoint metadata has {len(text)} bytes; at most {MAX_JSON_BYTES} are allowed")
    return {**files, METADATA: _Bytes(text)}


def _check_space(folder: Path, files: Mapping[str, TensorFile | _Bytes]) -> None:
    needed = sum(file.size for file in files.values()) + DISK_MARGIN
    available = shutil.disk_usage(folder).free
    if needed > available:
        raise LatentDiffError(
            f"{folder}: the disk is too full for a checkpoint: "
            f"{_format_bytes(needed)} needed, {_format_bytes(available)} available"
        )


def _format_bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _stage(staging: Path, step: int, files: Mapping[str, TensorFile | _Bytes]) -> None:
    """Write and sync all files, then read them back."""
    staging.mkdir()
    entries = {name: _write(staging / name, file.chunks()) for name, file in files.items()}
    _write(staging / MANIFEST, [encode_manifest(step, entries)])
    sync_folder(staging)
    if damage := verify(staging):
        raise LatentDiffError(f"{staging.parent}: the checkpoint of step {step} failed verification: {damage}")


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> Entry:
    """Write and sync a file; the hash is of the data passed in, not of what reached the disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return Entry(size, digest.hexdigest())


def _publish(staging: Path, target: Path) -> None:
    """Rename a finished checkpoint into place; an earlier one of the same step can be found until then."""
    old = _old(target)
    if _is_checkpoint(target) and verify(target) is None:
        discard(old)
        os.rename(target, old)
    else:
        discard(target)
    os.rename(staging, target)
    sync_folder(target.parent)


def _old(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")


def _rotate(newest: Path, step: int, keep: int, pinned: Collection[int]) -> None:
    kept = {step}
    for other_step, path in step_folders(newest.parent):
        if other_step > step or path == newest:
            continue
        wanted = other_step in pinned or len(kept.difference(pinned)) < keep
        if other_step not in kept and wanted and verify(path, rehash=False) is None:
            kept.add(other_step)
        else:
            discard(path)


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of each checkpoint, intact or not, newest first; `.old` comes after its replacement."""
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


def intact_metadata(folder: Path) -> list[dict[str, Any]]:
    """Return the metadata of all intact checkpoints; what this process has verified before is not read again."""
    return [read_metadata(path) for _, path in step_folders(folder) if verify(path, rehash=False) is None]


def _is_checkpoint(path: Path) -> bool:
    """Whether a checkpoint was ever written here; a user's own folder is never touched, whatever its name."""
    named = bool(FOLDER_NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    return named and ((path / MANIFEST).exists() or (path / METADATA).exists())


def discard(path: Path) -> None:
    """Delete a checkpoint, if it is one, renaming it first so that a half-deleted one is never found."""
    if _is_checkpoint(path):
        trash = _temporary_path(path, "trash")
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in [*folder.iterdir()]:
        if LEFTOVER_NAME.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _temporary_path(path: Path, purpose: str) -> Path:
    return path.with_name(f".{purpose}-{path.name}-{uuid.uuid4().hex}")


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that files renamed in it stay renamed."""
    if os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
