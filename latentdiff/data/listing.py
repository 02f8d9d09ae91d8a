"""What lies in a folder of pictures: each file is a picture, a caption, a table, a shard, or left out for a reason."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .left_out import LeftOut
from .pictures import EXTENSIONS
from .texts import SURROGATES

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SHARDS = (".parquet", ".tar")
UNREAD = (".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".ico", ".tga", ".ppm", ".pgm", ".exr", ".hdr",
          ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw")  # fmt: skip
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
SYSTEM = ("$recycle.bin", "system volume information", "__macosx", "@eadir", "lost+found", "thumbs.db", "desktop.ini")
# What latentdiff itself writes: a run's folders, and pictures that lie beside a certain file.
RUN_FILE, RUN_FOLDERS = "run.json", ("train_vae", "train_latent", "vae", "model", "model-best")
OWN_PICTURES = {"contact_sheet.png": "quarantine.txt",
                **dict.fromkeys(("concepts.png", "combinations.png", "copies.png"), "evaluation.json")}  # fmt: skip
EVALUATED = re.compile(r"(?:.*/)?drawn/[0-9a-f]{12}/[0-9a-f]{20}\.png")  # drawn to be evaluated
DRAWN = re.compile(r"\d{4,}-[a-z0-9-]+\.png")  # names that `latentdiff sample` gives, besides grid.png
DRAWN_MARK, DRAWN_HEAD = b"guidance_scale", 1 << 16  # in the metadata, within the first bytes of such a file

HIDDEN = "hidden files and folders, trash and files of the system"
OWN = "files and folders written by latentdiff"


@dataclass
class Listing:
    """The files below `root`, as paths relative to it with forward slashes."""

    root: Path
    pictures: dict[str, str | None] = field(default_factory=dict)  # each with its caption file, if there is one
    tables: list[str] = field(default_factory=list)  # one per folder at most
    shards: list[str] = field(default_factory=list)

    @property
    def caption_files(self) -> list[str]:
        """The caption files of all pictures."""
        return sorted({file for file in self.pictures.values() if file is not None})


def list_folder(root: Path, left_out: LeftOut) -> Listing:
    """List all files below a folder in a fixed order; linked folders are followed, each real folder once."""
    listing = Listing(root)
    for folder, files in _walk(root, left_out):
        _sort(listing, folder, files, left_out)
    return listing


def _walk(root: Path, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder, as `` or `path/`, with the names of its regular files; those behind links come last."""
    seen, waiting, links = set(), [""], list[str]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        real = os.path.realpath(root / folder)
        if real in seen:
            left_out.add("linked folders that are read already", [folder])
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            left_out.add(f"folders that cannot be read ({error.strerror})", [folder])
            continue
        is_run, files, folders = (root / folder / RUN_FILE).is_file(), list[str](), list[str]()
        for entry in entries:
            path = f"{folder}{entry.name}"
            try:
                is_dir, is_file = entry.is_dir(), entry.is_file()
                is_output = is_dir and ((is_run and entry.name in RUN_FOLDERS) or (root / path / RUN_FILE).is_file())
            except OSError as error:  # a link to itself, or a folder that may not be entered
                left_out.add(f"files and folders that cannot be read ({error.strerror})", [ascii(path)[1:-1]])
                continue
            if SURROGATES.search(entry.name):
                left_out.add("files and folders whose names are not valid UTF-8", [ascii(path)])
            elif entry.name.startswith(".") or entry.name.lower() in SYSTEM:
                left_out.add(HIDDEN, [path])
            elif is_output:
                left_out.add(OWN, [f"{path}/"])
            elif is_dir:
                (links if entry.is_symlink() else folders).append(f"{path}/")
            elif is_file:
                files.append(entry.name)
            else:
                left_out.add("links that lead nowhere" if entry.is_symlink() else "special files", [path])
        yield folder, files
        waiting += reversed(folders)


def _sort(listing: Listing, folder: str, files: list[str], left_out: LeftOut) -> None:
    """Sort the files of one folder into the listing."""
    texts: dict[str, str] = {}
    for name in files:
        if name.lower().endswith(".txt") and (name.endswith(".txt") or name[:-4] not in texts):
            texts[name[:-4]] = name  # cat.txt comes before cat.TXT
    known, used = set(files), set()
    tables = sorted((name for name in files if name.lower() in METADATA), key=lambda name: METADATA.index(name.lower()))
    for name in files:
        path, lower = f"{folder}{name}", name.lower()
        if lower.endswith(EXTENSIONS):
            text = texts.get(name.rpartition(".")[0])
            is_drawn = text is None and (
                EVALUATED.fullmatch(path) is not None or _was_drawn_here(listing.root / folder, name, files)
            )
            if OWN_PICTURES.get(name) in known or is_drawn:
                left_out.add(OWN, [path])
                continue
            used |= {text}
            listing.pictures[path] = None if text is None else f"{folder}{text}"
        elif name in tables[:1]:
            listing.tables.append(path)
        elif name in tables:
            left_out.add(f"tables beside {METADATA[0]}, {METADATA[1]} or another", [path])
        elif lower.endswith(SHARDS):
            listing.shards.append(path)
        elif lower.endswith(UNREAD):
            left_out.add("pictures in formats that are not read (convert them to PNG, JPEG or WebP)", [path])
        elif lower.endswith(ARCHIVES):
            left_out.add("archives that are not read (unpack them; only .tar is read)", [path])
        elif not lower.endswith(".txt"):
            left_out.add("files of other kinds", [path])
    orphans = (name for name in files if name.lower().endswith(".txt") and name not in used)
    left_out.add("texts without a picture of that name", (f"{folder}{name}" for name in orphans))


def _was_drawn_here(folder: Path, name: str, files: list[str]) -> bool:
    """Whether `latentdiff sample` has written a picture: by its name, and then by the metadata in it."""
    if name == "grid.png":  # beside what it shows
        name = next((other for other in files if DRAWN.fullmatch(other)), "")
    if not DRAWN.fullmatch(name):
        return False
    try:
        with (folder / name).open("rb") as file:
            return DRAWN_MARK in file.read(DRAWN_HEAD)
    except OSError:
        return False
