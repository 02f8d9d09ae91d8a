"""The manifest of a checkpoint: what its files should contain, and whether they still do."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST, METADATA = "manifest.json", "facts.json"
FORMAT = 1
MAX_JSON_BYTES = 2**24  # far more than real metadata needs; a hostile file must not exhaust memory
FILE_NAME = re.compile(
    r"[A-Za-z0-9_-]{1,100}\.safetensors|facts\.json"
)  # no other dots and no slashes, so a name cannot point outside the folder
STEP = re.compile(r"step-([0-9]{8,})")

# Files that this process has hashed and found intact: device, inode, size, ctime, digest.
_verified: set[tuple[int, int, int, int, str]] = set()


class DamagedCheckpoint(Exception):
    """Error for an incomplete or corrupt checkpoint; the message names the file and the problem."""


@dataclass(frozen=True)
class Entry:
    """Expected size and hash of a file."""

    bytes: int
    sha256: str


def encode_manifest(step: int, files: Mapping[str, Entry]) -> bytes:
    """Encode `manifest.json`; equal contents give equal bytes."""
    entries = {name: asdict(entry) for name, entry in files.items()}
    content = {"format": FORMAT, "step": step, "files": entries}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Entry]:
    """Read the manifest, but none of its files; raise unless `encode_manifest` wrote it for this step."""
    text = _read_small(path, MANIFEST)
    content = _parse(MANIFEST, text)
    try:
        files = {name: Entry(int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        step = int(content["step"])
        same = encode_manifest(step, files) == text
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise DamagedCheckpoint(f"{MANIFEST} is not a checkpoint manifest") from None
    # Compared as text, so that changed whitespace, a duplicate key or 1.0 for 1 is noticed like any other change.
    if not same or METADATA not in files or not all(FILE_NAME.fullmatch(name) for name in files):
        raise DamagedCheckpoint(f"{MANIFEST} is not a manifest written by latentdiff")
    named = STEP.search(path.name)
    if named and int(named[1]) != step:
        raise DamagedCheckpoint(f"{MANIFEST} belongs to step {step}")
    return files


def read_metadata(path: Path) -> dict[str, Any]:
    """Read `facts.json`; raise unless it is a JSON object."""
    return _parse(METADATA, _read_small(path, METADATA))


def verify(path: Path, *, rehash: bool = True) -> str | None:
    """Return what is wrong with a checkpoint folder, in one line that names the file, or None if it is intact.

    Without `rehash`, a file that this process has hashed before is trusted if its size and ctime have not changed.
    """
    try:
        for name, entry in read_manifest(path).items():
            _check_file(path, name, entry, rehash)
        read_metadata(path)
    except DamagedCheckpoint as damage:
        return str(damage)
    return None


def _check_file(path: Path, name: str, entry: Entry, rehash: bool) -> None:
    found = _status(path, name)
    if found.st_size < entry.bytes:
        raise DamagedCheckpoint(f"{name} is truncated ({found.st_size} of {entry.bytes} bytes)")
    if found.st_size > entry.bytes:
        raise DamagedCheckpoint(f"{name} is too long ({found.st_size} bytes instead of {entry.bytes})")
    fingerprint = (found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns, entry.sha256)
    if not rehash and fingerprint in _verified:
        return
    try:
        with (path / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedCheckpoint(f"{name} cannot be read ({error.strerror})") from None
    if digest != entry.sha256:
        raise DamagedCheckpoint(f"{name} is corrupt: its SHA-256 does not match the manifest")
    _verified.add(fingerprint)


def _status(path: Path, name: str) -> os.stat_result:
    try:
        status = (path / name).lstat()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{name} is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{name} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):  # a link may lead out of the folder, and reading a pipe would block
        raise DamagedCheckpoint(f"{name} is not a regular file")
    return status


def _read_small(path: Path, name: str) -> bytes:
    if _status(path, name).st_size > MAX_JSON_BYTES:
        raise DamagedCheckpoint(f"{name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{name} cannot be read ({error.strerror})") from None


def _parse(name: str, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # includes undecodable bytes and overlong numbers
        raise DamagedCheckpoint(f"{name} is not JSON") from None
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{name} is not a JSON object")
    return content
