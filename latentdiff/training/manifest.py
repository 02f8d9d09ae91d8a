"""What a checkpoint says of its own files, and whether that is still true."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST, FACTS = "manifest.json", "facts.json"
FORMAT = 1
LARGEST_JSON = 2**24  # bytes; nobody's facts are longer, and a hostile file must not fill the memory
FILE_NAME = re.compile(
    r"[A-Za-z0-9_-]{1,100}\.safetensors|facts\.json"
)  # no dots, no slashes: it cannot leave the folder
STEP = re.compile(r"step-([0-9]{8,})")

# Files that this process has hashed and found right: device, inode, size, time of change, digest.
_found_right: set[tuple[int, int, int, int, str]] = set()


class Damaged(Exception):
    """A checkpoint that is not whole; the message names the file and says what is wrong with it."""


@dataclass(frozen=True)
class Entry:
    """A file as it was meant to be."""

    bytes: int
    sha256: str


def encode_manifest(step: int, files: Mapping[str, Entry]) -> bytes:
    """The text of `manifest.json`; there is exactly one for given contents."""
    entries = {name: asdict(entry) for name, entry in files.items()}
    content = {"format": FORMAT, "step": step, "files": entries}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Entry]:
    """The files that a checkpoint folder says it has; nothing of them is read.

    Raises:
        Damaged: there is no manifest, or it is not one that `encode_manifest` wrote for this step.
    """
    text = _read_small(path, MANIFEST)
    content = _parse(MANIFEST, text)
    try:
        files = {name: Entry(int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        step = int(content["step"])
        same = encode_manifest(step, files) == text
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise Damaged(f"{MANIFEST} is not a manifest") from None
    # Compared as text, so that a changed blank, a doubled name or 1.0 for 1 is noticed like any other change.
    if not same or FACTS not in files or not all(FILE_NAME.fullmatch(name) for name in files):
        raise Damaged(f"{MANIFEST} is not a manifest of this program")
    named = STEP.search(path.name)
    if named and int(named[1]) != step:
        raise Damaged(f"{MANIFEST} is of step {step}")
    return files


def read_facts(path: Path) -> dict[str, Any]:
    """The contents of `facts.json`.

    Raises:
        Damaged: it cannot be read, or is not a JSON object.
    """
    return _parse(FACTS, _read_small(path, FACTS))


def verify(path: Path, *, rehash: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, in one line that names the file; None if it is whole.

    Args:
        path: the folder.
        rehash: read every file in full. Otherwise a file that this process has hashed before, and whose size and time
            of change are still the same, is taken as right.
    """
    try:
        for name, entry in read_manifest(path).items():
            _check_file(path, name, entry, rehash)
        read_facts(path)
    except Damaged as damage:
        return str(damage)
    return None


def _check_file(path: Path, name: str, entry: Entry, rehash: bool) -> None:
    found = _status(path, name)
    if found.st_size < entry.bytes:
        raise Damaged(f"{name} is truncated ({found.st_size} of {entry.bytes} bytes)")
    if found.st_size > entry.bytes:
        raise Damaged(f"{name} is too long ({found.st_size} bytes for {entry.bytes})")
    fingerprint = (found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns, entry.sha256)
    if not rehash and fingerprint in _found_right:
        return
    try:
        with (path / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from None
    if digest != entry.sha256:
        raise Damaged(f"{name} was changed: its SHA-256 is not the manifest's")
    _found_right.add(fingerprint)


def _status(path: Path, name: str) -> os.stat_result:
    try:
        status = (path / name).lstat()
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):  # a link leads out of the folder; a pipe would be waited for
        raise Damaged(f"{name} is not a plain file")
    return status


def _read_small(path: Path, name: str) -> bytes:
    if _status(path, name).st_size > LARGEST_JSON:
        raise Damaged(f"{name} is larger than {LARGEST_JSON} bytes")
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from None


def _parse(name: str, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # also undecodable bytes and endless numbers
        raise Damaged(f"{name} is not JSON") from None
    if not isinstance(content, dict):
        raise Damaged(f"{name} is not a JSON object")
    return content
