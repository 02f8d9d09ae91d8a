"""WebDataset shards: tar files in which consecutive members with the same stem form a sample.

Members are indexed once by their offset in the file, and nothing is ever unpacked. A damaged shard yields the samples
before the damage; what is left out is recorded in extra rows and reported every time the shard is opened.
"""

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from datasets import Dataset, Features, List, Value  # type: ignore[import-untyped]

from ..errors import LatentDiffError, one_line, several
from ..sections import DataConfig
from .left_out import LeftOut
from .listing import HIDDEN
from .pictures import EXTENSIONS
from .readers import Source, TarReader, clean_captions, stamp_of
from .tables import CAPTION_NAMES
from .texts import SURROGATES, decode, json_as_written, lines_of

MAX_TEXT = 1 << 20  # bytes of a caption file, or of a header
BLOCK = 512
FORMAT = 2  # of the index: `datasets` does not notice that this file has changed
TEXT, NUMBER = Value("string"), Value("int64")
FEATURES = Features(shard=TEXT, name=TEXT, offset=NUMBER, size=NUMBER, captions=List(TEXT), problem=TEXT)
Row = dict[str, Any]


def open_tars(root: Path, shards: Sequence[Path], config: DataConfig, left_out: LeftOut) -> Source:
    """Open uncompressed tar files below `root` as one source; raises LatentDiffError if they contain no pictures.

    `config.caption_columns` are the extensions and JSON keys that hold captions; empty: `CAPTION_NAMES`.
    """
    names = tuple(shard.relative_to(root).as_posix() for shard in shards)
    caption_keys, stamp = config.caption_columns or CAPTION_NAMES, stamp_of(root, shards)
    arguments = {"root": str(root), "names": names, "caption_keys": caption_keys, "stamp": f"{stamp} {FORMAT}"}
    table = Dataset.from_generator(_index_shards, features=FEATURES, gen_kwargs=arguments)
    rows = left_out.take(table["problem"][:])
    if not len(rows):
        raise LatentDiffError("; ".join([f"{root}: no pictures in {several(names)}", *left_out.lines()]))
    return Source(table, TarReader(root), ("captions",), stamp, rows)


def _index_shards(root: str, names: Sequence[str], caption_keys: Sequence[str], stamp: str) -> Iterator[Row]:
    """Yield one row per sample, and one for each member that is not used, with the reason.

    `stamp` only serves to give changed shards another key in the cache of `datasets`.
    """
    for name in names:
        shard, damage = _Shard(name, caption_keys), ""
        try:
            with (Path(root) / name).open("rb") as file:
                for member in _members(file):
                    shard.add(member, file)
        except (tarfile.TarError, OSError) as error:
            damage = f"tar files that are damaged, and only read up to the damage ({error})"
        yield from shard.rows(damaged=bool(damage))
        if damage:
            shard.skip(damage, "")
        elif not shard.samples:
            shard.skip("tar files without samples", "")
        for problem in shard.skipped:
            yield {"shard": name, "name": "", "offset": 0, "size": 0, "captions": [], "problem": problem}


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield members that are complete to the last byte.

    Raises tarfile.TarError if the file ends within a member or without an end-of-archive marker, or a header is broken.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
            while member := archive.next():
                if not member.issparse() and member.offset_data + member.size > size:  # else its size when unpacked
                    raise tarfile.ReadError(f"{member.name} is truncated")
                yield member
            end = archive.offset
    except (ValueError, EOFError) as error:
        raise tarfile.ReadError(str(error)) from None
    # tarfile takes a broken header for the end of the archive; the real end is a block of zeros.
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError(f"neither header nor end-of-archive marker at byte {end}")


class _Headers:
    """A tar file as the reader of its headers sees it: a header that says it is a gigabyte long is not read."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        """Read a header, an extended one or the name of a member."""
        if size > MAX_TEXT:
            raise tarfile.ReadError(f"a header of {size:,} bytes; at most {MAX_TEXT:,} are read")
        return self._read(size)


class _Shard:
    """The samples of one shard by member stem: where the picture is, and its captions."""

    def __init__(self, name: str, caption_keys: Sequence[str]) -> None:
        self.name, self.caption_keys = name, caption_keys
        self.samples: dict[str, Row] = {}
        self.skipped: list[str] = []  # reason<TAB>name of what is left out

    def skip(self, reason: str, member: str) -> None:
        """Note that a member, or with "" the shard, is left out."""
        self.skipped.append(f"{one_line(reason)}\t{self.name}{'/' if member else ''}{one_line(member)}")

    def add(self, member: tarfile.TarInfo, file: BinaryIO) -> None:
        """Index a member; folders are ignored, and what is neither picture nor caption is noted."""
        path = PurePosixPath(member.name)
        if member.isdir():
            return
        if not member.isreg() or member.issparse() or path.is_absolute() or ".." in path.parts:
            self.skip("links, devices or paths outside the shard", member.name)
            return
        if SURROGATES.search(member.name):
            self.skip("members whose names are not valid UTF-8", ascii(member.name))
            return
        if any(part.startswith(".") for part in path.parts):
            self.skip(HIDDEN, member.name)
            return
        stem, dot, extension = path.name.partition(".")
        suffix = (dot + extension).lower()
        if suffix not in EXTENSIONS and suffix != ".json" and suffix[1:] not in self.caption_keys:
            self.skip("members that are neither pictures nor captions", member.name)
            return
        sample = self.samples.setdefault(str(path.parent / stem), {"captions": []})
        if suffix in EXTENSIONS and "name" in sample:
            self.skip("surplus pictures of a sample", member.name)
        elif suffix in EXTENSIONS:
            sample.update(name=f"{self.name}/{path}", offset=member.offset_data, size=member.size)
        else:
            sample["captions"] += self._captions(suffix, member, file)

    def rows(self, damaged: bool) -> Iterator[Row]:
        """Yield the samples with a picture; the last one of a damaged shard only if it has its captions."""
        last = next(reversed(self.samples), None)
        for key, sample in self.samples.items():
            if "name" not in sample or (damaged and key == last and not sample["captions"]):
                self.skip("samples without a picture or truncated", key)
            else:
                yield {**sample, "shard": self.name, "captions": clean_captions(sample["captions"]), "problem": ""}

    def _captions(self, suffix: str, member: tarfile.TarInfo, file: BinaryIO) -> list[str]:
        """Return the lines of a text file, or the values of the caption keys in a JSON object."""
        try:
            if member.size > MAX_TEXT:
                raise ValueError("too long")
            file.seek(member.offset_data)
            text = decode(file.read(member.size))
            if suffix != ".json":
                return lines_of(text)
            values = json_as_written(text)
        except (ValueError, RecursionError):
            self.skip("caption files that are too long, not UTF-8 or not JSON", member.name)
            return []
        found = [values[key] for key in self.caption_keys if key in values] if isinstance(values, dict) else []
        texts = [text for value in found for text in (value if isinstance(value, list) else [value])]
        found = [text for text in texts if isinstance(text, str) and not SURROGATES.search(text)]
        if len(found) < sum(text is not None for text in texts):
            self.skip("captions that are not text", member.name)
        return found
