"""The one engine for folders of weights: checked before anything is allocated, whole before they have their names.

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
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.errors import LatentDiffError, complain, errors_of, one_line, several

CONFIG = "config.json"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOATS = ("BF16", "F16", "F32", "F64")  # safetensors' names of them
MAX_JSON = MAX_HEADER = 4 * 2**20  # bytes of a config, an index, or a safetensors header; real ones are far below
VARIANT = r"[A-Za-z0-9_]{1,32}"
PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors"  # of a shard: leads nowhere else

Device: TypeAlias = torch.device | str | None  # None is the CPU


class Stored(NamedTuple):
    """A tensor in an open file, not read yet."""

    path: Path
    file: Any  # as safe_open gives it
    name: str  # in the file
    shape: list[int]
    dtype: str  # as safetensors calls it

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor, copied: one that stays mapped to the file changes with the file."""
        return self.file.get_tensor(self.name).to(dtype, copy=True)


@dataclass(frozen=True)
class ModelFiles:
    """How one kind of model lies on disk."""

    model: str  # what it is called
    error: type[LatentDiffError]  # what opening and saving raise; the functions here raise a plain one
    stem: str = "diffusion_pytorch_model"  # what names of weight files begin with
    single_first: bool = False  # where there is an index, too: so transformers has it, and diffusers takes the index
    current_name: Callable[[str], str] = str  # today's name of a tensor, from one that an old file may have

    def staged(self, folder: Path, variant: str | None) -> AbstractContextManager[Path]:
        """As `staged`; what a former save left of the variant goes: diffusers takes an index before a single file."""
        self.names(variant)
        return staged(folder, is_former=lambda name: self._kind(name)[1:] == (variant,))

    def names(self, variant: str | None) -> tuple[str, str]:
        """The names of a variant's single file and of its index."""
        if variant is not None and (not isinstance(variant, str) or not re.fullmatch(VARIANT, variant)):
            raise LatentDiffError(f"variant={one_line(repr(variant))}: expected letters, digits and _, such as 'fp16'")
        ending = "" if variant is None else f".{variant}"
        return f"{self.stem}{ending}.safetensors", f"{self.stem}.safetensors.index{ending}.json"

    def find(self, folder: Path, variant: str | None) -> Path:
        """The single file or the index of a variant; the only variant there, where there are no plain files."""
        files = sorted(os.listdir(folder))
        there = {name: kind for name in files if (kind := self._kind(name)) and kind[0] != "shard"}
        variants = {kind[1] for kind in there.values()}
        if variant is None and None not in variants and len(variants) == 1:
            (variant,) = variants
        single, index = self.names(variant)
        former = [name for name, kind in there.items() if kind == ("index", variant)]  # the other place is of 2023
        for name in (single, index, *former) if self.single_first else (index, *former, single):
            if (folder / name).is_file():
                return folder / name
        others = several((name for name in files if name.endswith((".safetensors", ".bin", ".json"))), 10)
        advice = "; pickled .bin files are never opened: re-save them as safetensors" if [*folder.glob("*.bin")] else ""
        choice = f"choose a variant: {several(map(str, variants))}" if variants and variant is None else ""
        raise LatentDiffError(f"{folder / single}: no such file; {choice or f'the folder has {others}{advice}'}")

    def read_config(self, folder: Path) -> dict[str, Any]:
        """The folder's `config.json`."""
        if not folder.is_dir():
            raise LatentDiffError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
        return read_json(folder / CONFIG, f"a {self.model} folder has {CONFIG} and {self.names(None)[0]}")

    def read_weights(self, source: Path, model: nn.Module, device: Device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a file or of an index's shards, after all were compared with what the model has."""
        tensors = open_tensors(source, device, self.current_name)
        expected = {name: [list(tensor.shape)] for name, tensor in model.state_dict().items()}
        check_tensors(source, tensors, expected, self.model)
        return {name: tensors[name].read(dtype) for name in expected}

    def _kind(self, name: str) -> tuple[str, str | None] | tuple[()]:
        """What a file is by its name, `single`, `shard` or `index`, and of which variant; nothing for any other."""
        variant = rf"(?:\.({VARIANT}))?"
        if match := re.fullmatch(rf"{self.stem}{variant}(-\d{{5}}-of-\d{{5}})?\.safetensors", name):
            return ("shard" if match[2] else "single"), match[1]
        match = re.fullmatch(rf"{self.stem}\.safetensors{variant}\.index{variant}\.json", name)
        return ("index", match[1] or match[2]) if match else ()


class Pretrained(nn.Module):
    """A model that lies in a folder as diffusers has it; `config_class` translates its `config.json`."""

    files: ClassVar[ModelFiles]
    config_class: ClassVar[Any]
    config: Any

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: Device = None, dtype: torch.dtype | None = None, variant: str | None = None
    ) -> Self:
        """Open a folder with diffusers' `config.json` and `diffusion_pytorch_model.safetensors`, in evaluation mode.

        Args:
            device: where the weights go; the CPU by default.
            dtype: what they are cast to; float32 by default.
            variant: of the weights' files, such as `fp16`; None: the plain ones, or the only variant there is.

        Raises:
            LatentDiffError: of the model's own kind; a file is missing, damaged, or not of a model that is supported.
                Nothing is allocated before the configuration and all tensors were checked.
        """
        folder = Path(folder)
        with errors_of(cls.files.error):
            dtype = check_dtype(dtype)
            values = cls.files.read_config(folder)
            try:
                with torch.device("meta"):  # shapes only, no memory
                    model = cls(cls.config_class.from_diffusers(values))
            except LatentDiffError as error:
                raise LatentDiffError(f"{folder / CONFIG}: {one_line(error)}") from None
            weights = cls.files.read_weights(cls.files.find(folder, variant), model, device, dtype)
        model.load_state_dict(weights, assign=True)
        return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def save_pretrained(
        self, folder: str | Path, facts: Mapping[str, str] | None = None, *, dtype: torch.dtype | None = None,
        variant: str | None = None, max_shard_bytes: int | None = None,
    ) -> None:  # fmt: skip
        """Write the folder that `from_pretrained` and diffusers open.

        Args:
            facts: what else is known of the weights, for the header of each file: diffusers warns of keys that it does
                not know in the config.
            dtype: what the weights are cast to on the way; None: as they are.
            variant: for the names of the weights' files, such as `fp16`.
            max_shard_bytes: size above which the weights are split over several files.

        Raises:
            LatentDiffError: of the model's own kind; an argument is not allowed, or the folder cannot be written.
        """
        with errors_of(self.files.error):
            if max_shard_bytes is not None and (type(max_shard_bytes) is not int or max_shard_bytes < 1):
                raise LatentDiffError(f"max_shard_bytes={max_shard_bytes!r}: expected a whole number from 1 up")
            single, index = self.files.names(variant)
            dtype = dtype if dtype is None else check_dtype(dtype)
            weights = self.state_dict()
            sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in weights.items()}
            shards = _split(sizes, max_shard_bytes or sum(sizes.values()), single)
            with self.files.staged(Path(folder), variant) as staging:
                for shard, names in shards.items():  # cast one shard at a time; files know no channels-last
                    tensors = {name: weights[name].to(dtype or weights[name].dtype).contiguous() for name in names}
                    save_file(tensors, staging / shard, metadata={**(facts or {}), "format": "pt"})
                (staging / CONFIG).write_text(to_json(self.config.to_diffusers()), encoding="utf-8")
                if len(shards) > 1:
                    places = {name: shard for shard, names in shards.items() for name in names}
                    total = {"total_size": sum(sizes.values())}
                    (staging / index).write_text(to_json({"metadata": total, "weight_map": places}), encoding="utf-8")


@contextmanager
def staged(folder: Path, file: str = "", is_former: Callable[[str], object] = lambda name: False) -> Iterator[Path]:
    """A folder for files that, once all are written, get their names in `folder`: weights first, an index last.

    Where the folder is not the writer's alone, `file` is the one that is written. `is_former` says which go, by name.
    """
    staging = folder / f".partial-{file}"
    with errors_of(LatentDiffError, f"{folder / file}: cannot be written", OSError, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        try:
            staging.mkdir()
            yield staging
            names = sorted(os.listdir(staging), key=lambda name: (not name.endswith(".safetensors"), ".index." in name))
            if ".index." in names[-1]:  # else, for a moment, a former index would name new shards beside old ones
                (folder / names[-1]).unlink(missing_ok=True)
            for name in names:
                os.replace(staging / name, folder / name)
            for name in sorted(os.listdir(folder), reverse=True):  # an index before its shards
                if is_former(name) and name not in names:
                    (folder / name).unlink()
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def to_json(values: Mapping[str, Any]) -> str:
    """The text of a config as it lies on disk."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object in a file of reasonable size; `why` there should be one is for the error where there is none."""
    with errors_of(LatentDiffError, f"{path}: not valid JSON", OSError, ValueError, RecursionError):
        if not path.exists():
            raise LatentDiffError(f"{path}: no such file; {why}")
        if (size := path.stat().st_size) > MAX_JSON:
            raise LatentDiffError(f"{path}: has {size} bytes; expected at most {MAX_JSON}")
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    if not isinstance(values, dict):
        raise LatentDiffError(f"{path}: holds a {type(values).__name__}; expected an object")
    return values


def open_file(path: Path, device: Device = None, limit: int = MAX_HEADER) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and metadata of a safetensors file. The library itself lets giant headers pass, and names twice."""
    if not path.is_file():
        raise LatentDiffError(f"{path}: no such file")
    kinds = SafetensorError, OSError, ValueError, RecursionError
    with errors_of(LatentDiffError, f"{path}: damaged or not a safetensors file", *kinds), path.open("rb") as raw:
        length, size = int.from_bytes(raw.read(8), "little"), os.fstat(raw.fileno()).st_size
        if length > limit:
            raise ValueError(f"of {size} bytes, with a header of {length}; at most {limit} are read")
        file: Any = safe_open(path, framework="pt", device=str(device or "cpu"))  # also checks what the header says
        header = json.loads(raw.read(length), object_pairs_hook=partial(_unique, where="its header"))
    facts = header.pop("__metadata__", None) or {}
    return {name: Stored(path, file, name, entry["shape"], entry["dtype"]) for name, entry in header.items()}, facts


def open_tensors(source: Path, device: Device = None, current_name: Callable[[str], str] = str) -> dict[str, Stored]:
    """The tensors of a file, or of all shards that an index names, by today's names."""
    tensors: dict[str, Stored] = {}
    promises: Mapping[Path, set[str] | None] = _read_index(source) if source.suffix == ".json" else {source: None}
    for path, promised in promises.items():
        found, _ = open_file(path, device)
        if promised is not None:
            complain(path, f"lacks, though {source.name} has them,", promised - found.keys())
            complain(path, f"has, though {source.name} has not,", found.keys() - promised)
        here = {current_name(name): tensor for name, tensor in found.items()}
        if len(here) < len(found) or here.keys() & tensors.keys():
            raise LatentDiffError(f"{path}: has a tensor under two names, that of today and that of 2022")
        tensors |= here
    return tensors


def check_tensors(
    source: Path, tensors: Mapping[str, Stored], expected: dict[str, list[list[int]]], model: str
) -> None:
    """Compare names, shapes and dtypes with those of a model: for each name the shapes that the tensor may have."""
    complain(source, "lacks", expected.keys() - tensors.keys())
    complain(source, f"has, and this {model} has not,", tensors.keys() - expected.keys())
    for name, shapes in expected.items():
        path, *_, shape, dtype = tensors[name]
        if shape not in shapes:
            raise LatentDiffError(f"{path}: {name} has shape {one_line(shape)}; the config says {shapes[0]}")
        if dtype not in FLOATS:
            raise LatentDiffError(f"{path}: {name} is {dtype}; expected one of {', '.join(FLOATS)}")


def check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Only what both torch and the files can hold; float32 where nothing is said."""
    if dtype is not None and dtype not in DTYPES:
        raise LatentDiffError(f"dtype={dtype!r}: expected a floating point torch.dtype such as torch.bfloat16")
    return dtype or torch.float32


def _split(sizes: Mapping[str, int], limit: int, single: str) -> dict[str, list[str]]:
    """Tensors in their order, in files of at most `limit` bytes; a larger tensor has a file of its own."""
    shards: list[list[str]] = []
    size = limit
    for name, more in sizes.items():
        size += more
        if size > limit or not shards:
            shards.append([])
            size = more
        shards[-1].append(name)
    if len(shards) == 1:
        return {single: shards[0]}
    stem = single.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def _read_index(path: Path) -> dict[Path, set[str]]:
    """The shards that an index names, with the tensors each should hold. No shard was opened yet."""
    weight_map = read_json(path, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LatentDiffError(f"{path}: weight_map={one_line(weight_map)}: expected an object of tensor and file names")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(PLAIN_NAME, shard):
            found = f"{one_line(name)} is in {one_line(repr(shard))}"
            raise LatentDiffError(f"{path}: {found}; expected the plain name of a .safetensors file")
        shards.setdefault(path.parent / shard, set()).add(name)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise LatentDiffError(f"{path}: {len(missing)} of its {len(shards)} files are missing: {several(missing)}")
    home = path.parent.resolve()
    # In the Hugging Face cache, files are links out of `snapshots/REVISION` to `blobs` beside it.
    home = next((up.parent for up in home.parents if up.name == "snapshots"), home)
    if out := [shard for shard in shards if not shard.resolve().is_relative_to(home)]:
        raise LatentDiffError(f"{out[0]}: is a link to {out[0].resolve()}; expected a file in the folder of the index")
    return shards


def _unique(pairs: list[tuple[str, Any]], where: str = "it") -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):  # parsers differ in which one they take
        raise ValueError(f"{where} has the key {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} twice")
    return values
