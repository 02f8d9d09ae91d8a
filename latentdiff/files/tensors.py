"""Folders of weights: every tensor is checked before any is loaded, and files get their names only once complete.

Beside `config.json`; STEM is `diffusion_pytorch_model` in diffusers, `model` in transformers, a variant such as `fp16`:

    STEM[.fp16].safetensors                      one file
    STEM.safetensors.index[.fp16].json           or an index: tensor name -> shard,
    STEM[.fp16]-00001-of-00002.safetensors       and its shards
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from latentdiff.errors import LatentDiffError, one_line, raise_for_tensors, reraise_as, several

CONFIG = "config.json"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOATS = ("BF16", "F16", "F32", "F64")  # safetensors' names of them
MAX_JSON = MAX_HEADER = 4 * 2**20  # bytes of a config, an index or a safetensors header; real ones are far smaller
VARIANT = r"[A-Za-z0-9_]{1,32}"
PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors"  # of a shard; cannot point to another folder

Device: TypeAlias = torch.device | str | None  # None is the CPU


class Stored(NamedTuple):
    """A tensor in an open file, read on demand."""

    path: Path
    file: Any  # from safe_open
    name: str  # in the file
    shape: list[int]
    dtype: str  # safetensors' name of it

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return a copy: a tensor that stays memory-mapped would change with the file."""
        return self.file.get_tensor(self.name).to(dtype, copy=True)


@dataclass(frozen=True)
class ModelFiles:
    """How one kind of model is stored on disk."""

    model: str  # its name in messages
    error: type[LatentDiffError]  # raised by loading and saving; the functions below raise the base class
    stem: str = "diffusion_pytorch_model"  # that weight file names begin with
    single_first: bool = False  # prefer a single file to an index, as in transformers; diffusers prefers the index
    current_name: Callable[[str], str] = str  # maps tensor names of old files to current ones

    def staged(self, folder: Path, variant: str | None) -> AbstractContextManager[Path]:
        """Like `staged`, and remove what an earlier save left of the variant, since an index may hide a single file."""
        self.names(variant)
        return staged(folder, is_stale=lambda name: self._kind(name)[1:] == (variant,))

    def names(self, variant: str | None) -> tuple[str, str]:
        """Return the file names of a variant's single file and index."""
        if variant is not None and (not isinstance(variant, str) or not re.fullmatch(VARIANT, variant)):
            raise LatentDiffError(f"variant={one_line(repr(variant))}: expected letters, digits and _, such as 'fp16'")
        ending = "" if variant is None else f".{variant}"
        return f"{self.stem}{ending}.safetensors", f"{self.stem}.safetensors.index{ending}.json"

    def find(self, folder: Path, variant: str | None) -> Path:
        """Return the single file or index of a variant; if None, of the plain files or else the only variant."""
        files = sorted(os.listdir(folder))
        kinds = {name: kind for name in files if (kind := self._kind(name)) and kind[0] != "shard"}
        variants = {kind[1] for kind in kinds.values()}
        if variant is None and None not in variants and len(variants) == 1:
            (variant,) = variants
        single, index = self.names(variant)
        older = [name for name, kind in kinds.items() if kind == ("index", variant)]  # the naming scheme of 2023
        for name in (single, index, *older) if self.single_first else (index, *older, single):
            if (folder / name).is_file():
                return folder / name
        others = several((name for name in files if name.endswith((".safetensors", ".bin", ".json"))), 10)
        advice = "; pickled .bin files are never opened: re-save them as safetensors" if [*folder.glob("*.bin")] else ""
        choice = f"choose a variant: {several(map(str, variants))}" if variants and variant is None else ""
        raise LatentDiffError(f"{folder / single}: no such file; {choice or f'the folder has {others}{advice}'}")

    def read_config(self, folder: Path) -> dict[str, Any]:
        """Read the folder's `config.json`."""
        if not folder.is_dir():
            raise LatentDiffError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
        return read_json(folder / CONFIG, f"a {self.model} folder has {CONFIG} and {self.names(None)[0]}")

    def read_weights(self, source: Path, model: nn.Module, device: Device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read the tensors of a file or of an index's shards, once all have been checked against the model."""
        tensors = open_tensors(source, device, self.current_name)
        expected = {name: [list(tensor.shape)] for name, tensor in model.state_dict().items()}
        check_tensors(source, tensors, expected, self.model)
        return {name: tensors[name].read(dtype) for name in expected}

    def _kind(self, name: str) -> tuple[str, str | None] | tuple[()]:
        """Classify a file name as `single`, `shard` or `index`, with its variant; empty for any other file."""
        variant = rf"(?:\.({VARIANT}))?"
        if match := re.fullmatch(rf"{self.stem}{variant}(-\d{{5}}-of-\d{{5}})?\.safetensors", name):
            return ("shard" if match[2] else "single"), match[1]
        match = re.fullmatch(rf"{self.stem}\.safetensors{variant}\.index{variant}\.json", name)
        return ("index", match[1] or match[2]) if match else ()


@contextmanager
def staged(folder: Path, file: str = "", is_stale: Callable[[str], object] = lambda name: False) -> Iterator[Path]:
    """Yield a temporary folder whose files, once all are written, move to `folder`: weights first, an index last.

    `file` is the one to be written, if other writers share the folder; `is_stale` selects old files to delete.
    """
    staging = folder / f".partial-{file}"
    with reraise_as(LatentDiffError, f"{folder / file}: cannot be written", OSError, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed process
        try:
            staging.mkdir()
            yield staging
            names = sorted(os.listdir(staging), key=lambda name: (not name.endswith(".safetensors"), ".index." in name))
            if ".index." in names[-1]:  # else an old index would briefly mix new and old shards
                (folder / names[-1]).unlink(missing_ok=True)
            for name in names:
                os.replace(staging / name, folder / name)
            for name in sorted(os.listdir(folder), reverse=True):  # an index before its shards
                if is_stale(name) and name not in names:
                    (folder / name).unlink()
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def to_json(values: Mapping[str, Any]) -> str:
    """Format a config as it is written to disk."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def read_json(path: Path, why: str) -> dict[str, Any]:
    """Read a JSON object from a file of limited size; if there is no file, the error says `why` there should be one."""
    with reraise_as(LatentDiffError, f"{path}: not valid JSON", OSError, ValueError, RecursionError):
        if not path.exists():
            raise LatentDiffError(f"{path}: no such file; {why}")
        if (size := path.stat().st_size) > MAX_JSON:
            raise LatentDiffError(f"{path}: {size} bytes is too large; expected at most {MAX_JSON}")
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    if not isinstance(values, dict):
        raise LatentDiffError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def open_file(path: Path, device: Device = None, limit: int = MAX_HEADER) -> tuple[dict[str, Stored], dict[str, str]]:
    """Open the tensors and metadata of a file; reject huge headers and duplicate names, which the library accepts."""
    if not path.is_file():
        raise LatentDiffError(f"{path}: no such file")
    kinds = SafetensorError, OSError, ValueError, RecursionError
    with reraise_as(LatentDiffError, f"{path}: damaged or not a safetensors file", *kinds), path.open("rb") as raw:
        length, size = int.from_bytes(raw.read(8), "little"), os.fstat(raw.fileno()).st_size
        if length > limit:
            raise ValueError(f"{size} bytes with a header of {length}; expected at most {limit}")
        file: Any = safe_open(path, framework="pt", device=str(device or "cpu"))  # also validates the header
        header = json.loads(raw.read(length), object_pairs_hook=partial(_unique, where="its header"))
    metadata = header.pop("__metadata__", None) or {}
    return {name: Stored(path, file, name, entry["shape"], entry["dtype"]) for name, entry in header.items()}, metadata


def read_facts(source: Path) -> dict[str, str]:
    """Return the metadata of a file, or of the first shard in an index."""
    return open_file(next(iter(_read_index(source))) if source.suffix == ".json" else source)[1]


def open_tensors(source: Path, device: Device = None, current_name: Callable[[str], str] = str) -> dict[str, Stored]:
    """Open the tensors of a file, or of all shards in an index, under their current names."""
    tensors: dict[str, Stored] = {}
    listed: Mapping[Path, set[str] | None] = _read_index(source) if source.suffix == ".json" else {source: None}
    for path, names in listed.items():
        found, _ = open_file(path, device)
        if names is not None:
            raise_for_tensors(path, f"does not match {source.name}: lacks", names - found.keys())
            raise_for_tensors(path, f"not listed in {source.name}:", found.keys() - names)
        renamed = {current_name(name): tensor for name, tensor in found.items()}
        if len(renamed) < len(found) or renamed.keys() & tensors.keys():
            raise LatentDiffError(f"{path}: has a tensor twice, under its current name and its name of 2022")
        tensors |= renamed
    return tensors


def check_tensors(
    source: Path, tensors: Mapping[str, Stored], expected: dict[str, list[list[int]]], model: str
) -> None:
    """Raise unless names, shapes and dtypes match a model; `expected` has the shapes allowed for each name."""
    raise_for_tensors(source, "lacks", expected.keys() - tensors.keys())
    raise_for_tensors(source, f"unexpected for this {model}:", tensors.keys() - expected.keys())
    for name, shapes in expected.items():
        path, *_, shape, dtype = tensors[name]
        if shape not in shapes:
            raise LatentDiffError(f"{path}: {name} has shape {one_line(shape)}; the config says {shapes[0]}")
        if dtype not in FLOATS:
            raise LatentDiffError(f"{path}: {name} is {dtype}; expected one of {', '.join(FLOATS)}")


def check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype, float32 by default; raise unless both torch and safetensors can store it."""
    if dtype is not None and dtype not in DTYPES:
        raise LatentDiffError(f"dtype={dtype!r}: expected a floating-point torch.dtype such as torch.bfloat16")
    return dtype or torch.float32


def split_into_files(sizes: Mapping[str, int], limit: int, single: str) -> dict[str, list[str]]:
    """Split tensors, in order, into files of at most `limit` bytes; a larger tensor gets a file of its own."""
    shards: list[list[str]] = []
    size = limit
    for name, added in sizes.items():
        size += added
        if size > limit or not shards:
            shards.append([])
            size = added
        shards[-1].append(name)
    if len(shards) == 1:
        return {single: shards[0]}
    stem = single.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def _read_index(path: Path) -> dict[Path, set[str]]:
    """Return the shards that an index names, each with its tensor names, without opening them."""
    weight_map = read_json(path, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LatentDiffError(f"{path}: weight_map={one_line(weight_map)}: expected a mapping of tensors to files")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(PLAIN_NAME, shard):
            found = f"{one_line(name)} is in {one_line(repr(shard))}"
            raise LatentDiffError(f"{path}: {found}; expected the plain name of a .safetensors file")
        shards.setdefault(path.parent / shard, set()).add(name)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise LatentDiffError(f"{path}: {len(missing)} of its {len(shards)} files are missing: {several(missing)}")
    home = path.parent.resolve()
    # The Hugging Face cache has links in `models--NAME/snapshots/REVISION` to files in `models--NAME/blobs`.
    home = next((parent for parent in home.parents if parent.name.startswith("models--")), home)
    if outside := [shard for shard in shards if not shard.resolve().is_relative_to(home)]:
        raise LatentDiffError(f"{outside[0]}: is a link to {outside[0].resolve()}; expected a file next to the index")
    return shards


def _unique(pairs: list[tuple[str, Any]], where: str = "it") -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):  # parsers disagree on which one to keep
        raise ValueError(f"{where} has the key {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} twice")
    return values
