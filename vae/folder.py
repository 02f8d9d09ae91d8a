"""Reading and writing a model folder: `config.json` and safetensors files, checked before anything is allocated.

Weights are one file, or shards with an index of them; a variant such as `fp16` has its own names beside the plain ones:

    diffusion_pytorch_model[.fp16].safetensors                      one file
    diffusion_pytorch_model.safetensors.index[.fp16].json           or an index: tensor name -> shard,
    diffusion_pytorch_model[.fp16]-00001-of-00002.safetensors       and its shards
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import VAEError

CONFIG, STEM = "config.json", "diffusion_pytorch_model"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of them

# Bounds on what a stranger's file may cost us before it is refused; real ones are far below.
MAX_JSON = 4 * 2**20  # bytes of a config or an index
MAX_HEADER = 4 * 2**20  # bytes of a safetensors header, where safetensors' own limit is 100 MB
MAX_BLOCKS = 128  # levels x layers in a config; kl-f8 has 8

VARIANT = r"[A-Za-z0-9_]{1,32}"
INDEX = re.compile(rf"{STEM}\.safetensors(\.{VARIANT})?\.index(\.{VARIANT})?\.json")  # the former place is of 2023
SINGLE = re.compile(rf"{STEM}(\.{VARIANT})?\.safetensors")
SHARD = re.compile(rf"{STEM}(\.{VARIANT})?-\d{{5}}-of-\d{{5}}\.safetensors")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")  # of a shard: leads nowhere else

Model = TypeVar("Model", bound=nn.Module)


def load_folder(
    folder: Path,
    build: Callable[[Mapping[str, Any]], Model],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    variant: str | None = None,
) -> Model:
    """The model that `build` makes of the folder's config, with the folder's weights, in evaluation mode."""
    dtype = torch.float32 if dtype is None else dtype
    check_dtype(dtype)
    values = read_config(folder)
    try:
        check_blocks(values)
        with torch.device("meta"):  # shapes only, no memory
            model = build(values)
    except VAEError as error:
        raise VAEError(f"{folder / CONFIG}: {_line(error)}") from None
    weights = read_weights(find_weights(folder, variant), model, device or "cpu", dtype)
    model.load_state_dict(weights, assign=True)
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def save_folder(
    model: nn.Module,
    values: Mapping[str, Any],
    folder: Path,
    facts: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    variant: str | None = None,
) -> None:
    """Write config and weights; each file appears under its name only when it is whole, an index after its shards.

    Raises:
        VAEError: an argument is not one of those allowed, or the folder cannot be written to.
    """
    if dtype is not None:
        check_dtype(dtype)
    if max_shard_bytes is not None and (type(max_shard_bytes) is not int or max_shard_bytes < 1):
        raise VAEError(f"max_shard_bytes={max_shard_bytes!r}: expected a whole number of bytes from 1 up")
    single, index = names_of(variant)
    weights = model.state_dict()
    sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in weights.items()}
    shards = split(sizes, max_shard_bytes or sum(sizes.values()), single)
    texts = {CONFIG: values}
    if len(shards) > 1:  # last, because it makes the shards count
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        texts[index] = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    partial = {name: folder / f"{name}.partial" for name in (*shards, *texts)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for shard, names in shards.items():  # cast one shard at a time; files know no channels-last
            tensors = {name: weights[name].to(dtype or weights[name].dtype).contiguous() for name in names}
            save_file(tensors, partial[shard], metadata={**(facts or {}), "format": "pt"})
        for name, content in texts.items():
            partial[name].write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if index in texts:  # else, for a moment, a former index would name new shards beside old ones
            (folder / index).unlink(missing_ok=True)
        for name, path in partial.items():
            os.replace(path, folder / name)
        remove_former(folder, variant, partial.keys())
    except (OSError, SafetensorError) as error:
        raise VAEError(f"{folder}: cannot be written ({error})") from error
    finally:
        for path in partial.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)


def names_of(variant: str | None) -> tuple[str, str]:
    """The names of a variant's single file and of its index."""
    if variant is not None and (not isinstance(variant, str) or not re.fullmatch(VARIANT, variant)):
        raise VAEError(f"variant={_line(repr(variant))}: expected letters, digits and _, such as 'fp16'")
    ending = "" if variant is None else f".{variant}"
    return f"{STEM}{ending}.safetensors", f"{STEM}.safetensors.index{ending}.json"


def split(sizes: Mapping[str, int], limit: int, single: str) -> dict[str, list[str]]:
    """Tensors in their order, in files of at most `limit` bytes; a larger tensor has a file of its own."""
    shards: list[list[str]] = []
    size = 0
    for name, more in sizes.items():
        if not shards or size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    if len(shards) == 1:
        return {single: shards[0]}
    stem = single.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def remove_former(folder: Path, variant: str | None, keep: Set[str]) -> None:
    """Remove what a former save left of this variant: diffusers takes an index before a single file."""
    for name in sorted(path.name for path in folder.iterdir()):
        if name not in keep and any(_variant(pattern, name) == (variant,) for pattern in (INDEX, SINGLE, SHARD)):
            (folder / name).unlink()


def find_weights(folder: Path, variant: str | None) -> Path:
    """The single file or the index of a variant; the only variant there, where there are no plain files."""
    single, index = names_of(variant)
    names = sorted(path.name for path in folder.iterdir())
    there = [(of[0], name) for name in names for pattern in (INDEX, SINGLE) if (of := _variant(pattern, name))]
    variants = {of for of, _ in there}
    if variant is None and None not in variants and variants:
        if len(variants) > 1:
            raise VAEError(f"{folder / single}: no such file; choose a variant: {_several(map(str, variants))}")
        single, index = names_of(variant := variants.pop())
    # As diffusers has it: today's index first, then the index of 2023, then the single file.
    former = [name for of, name in there if of == variant and INDEX.fullmatch(name)]
    for name in (index, *former, single):
        if (folder / name).is_file():
            return folder / name
    others = _several((name for name in names if name.endswith((".safetensors", ".bin", ".json"))), 10)
    advice = "; pickled .bin files are never opened: re-save them as safetensors" if [*folder.glob("*.bin")] else ""
    raise VAEError(f"{folder / single}: no such file; the folder has {others}{advice}")


def read_config(folder: Path) -> Mapping[str, Any]:
    """The folder's `config.json` as a dictionary."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise VAEError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
    if not path.is_file():
        raise VAEError(f"{path}: no such file; a VAE folder has {CONFIG} and {names_of(None)[0]}")
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file of reasonable size."""
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise VAEError(f"{path}: has {size} bytes; expected at most {MAX_JSON}")
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise VAEError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also undecodable bytes and endless numbers
        if isinstance(error, VAEError):
            raise
        raise VAEError(f"{path}: not valid JSON ({_line(error)})") from None
    if not isinstance(values, dict):
        raise VAEError(f"{path}: holds a {type(values).__name__}; expected an object")
    return values


def read_index(path: Path) -> dict[Path, set[str]]:
    """The shards that an index names, with the tensors each should hold. No shard was opened yet."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise VAEError(f"{path}: weight_map={_line(repr(weight_map))}: expected an object of tensor and file names")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not PLAIN_NAME.fullmatch(shard):
            raise VAEError(
                f"{path}: {_line(name)} is in {_line(repr(shard))}; expected the plain name of a .safetensors file"
            )
        shards.setdefault(path.parent / shard, set()).add(name)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise VAEError(f"{path}: {len(missing)} of its {len(shards)} files are missing: {_several(missing)}")
    home = path.parent.resolve()
    # In the Hugging Face cache, files are links out of `snapshots/REVISION` to `blobs` beside it.
    home = next((up.parent for up in home.parents if up.name == "snapshots"), home)
    for shard in shards:
        if not shard.resolve().is_relative_to(home):
            raise VAEError(f"{shard}: is a link to {shard.resolve()}; expected a file in the folder of the index")
    return shards


def read_weights(source: Path, model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file or of an index's shards, after names, shapes and dtypes were compared with the model's."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    promises: Mapping[Path, set[str] | None] = read_index(source) if source.suffix == ".json" else {source: None}
    places: dict[str, tuple[Path, Any, str]] = {}  # of each tensor the file, and its name there
    with ExitStack() as stack:
        for path, promised in promises.items():
            file = stack.enter_context(_open(path, device))
            names = set(file.keys())
            if promised is not None:
                _complain(path, f"lacks, though {source.name} has them,", promised - names)
                _complain(path, f"has, though {source.name} has not,", names - promised)
            here = {current_name(name): (path, file, name) for name in names}
            if len(here) < len(names) or here.keys() & places.keys():
                raise VAEError(f"{path}: has a tensor under two names, that of today and that of 2022")
            places |= here
        _complain(source, "lacks", expected.keys() - places.keys())
        _complain(source, "has, and this VAE has not,", places.keys() - expected.keys())
        for name, shape in expected.items():
            path, file, stored = places[name]
            found = file.get_slice(stored)
            if found.get_shape() != shape:
                raise VAEError(f"{path}: {name} has shape {_line(found.get_shape())}; the config says {shape}")
            if found.get_dtype() not in FLOATS:
                raise VAEError(f"{path}: {name} is {found.get_dtype()}; expected one of {sorted(FLOATS)}")
        # Copied, because a tensor that stays mapped to the file changes with the file.
        return {name: places[name][1].get_tensor(places[name][2]).to(dtype, copy=True) for name in expected}


def current_name(name: str) -> str:
    """Today's name of a tensor: files of 2022, Stable Diffusion 1.x among them, name the attention layers otherwise."""
    parts = name.split(".")
    if "attentions" in parts:
        parts = [FORMER_NAMES.get(part, part) for part in parts]
    return ".".join(parts)


def check_dtype(dtype: object) -> None:
    """Only what both torch and the files can hold."""
    if dtype not in DTYPES:
        raise VAEError(f"dtype={dtype!r}: expected a floating point torch.dtype such as torch.bfloat16")


def check_blocks(values: Mapping[str, Any]) -> None:
    """Refuse what would take minutes to build, though each number in it is in bounds."""
    levels = values.get("block_out_channels")
    blocks = len(levels) if isinstance(levels, list) else 1
    for key in ("layers_per_block",):
        value = values.get(key, 1)
        numbers = [number for number in (value if isinstance(value, list) else [value]) if type(number) is int]
        blocks *= max((number for number in numbers if 1 <= number <= 100), default=1)  # others: the config complains
    if blocks > MAX_BLOCKS:
        raise VAEError(f"levels x layers is {blocks}, which is not supported; at most {MAX_BLOCKS} is")


def _open(path: Path, device: torch.device | str) -> Any:
    """An open safetensors file, checked for what safetensors lets pass too: a giant header, a name that is in twice."""
    try:
        with path.open("rb") as raw:
            if (length := int.from_bytes(raw.read(8), "little")) > MAX_HEADER:
                raise ValueError(f"its header would have {length} bytes; expected at most {MAX_HEADER}")
            file = safe_open(path, framework="pt", device=str(device))
            json.loads(raw.read(length), object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError) as error:
        raise VAEError(f"{path}: damaged or not a safetensors file ({_line(error)})") from None
    return file


def _variant(pattern: re.Pattern[str], name: str) -> tuple[str | None] | None:
    """The variant in a file's name, in a tuple because the plain one is None; None for a name of another kind."""
    match = pattern.fullmatch(name)
    return match and (next((group[1:] for group in match.groups() if group), None),)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):  # parsers differ in which one they take
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} is in it twice")
    return values


def _line(value: object) -> str:
    """What a stranger's file says, fit for a line of ours."""
    text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:300]}…"


def _several(names: Iterable[str], most: int = 3) -> str:
    ordered = sorted(names)
    return ", ".join(map(_line, ordered[:most])) + (", …" if len(ordered) > most else "")


def _complain(path: Path, problem: str, names: Set[str]) -> None:
    if names:
        raise VAEError(f"{path}: {problem} {len(names)} tensor{'s' if len(names) > 1 else ''}: {_several(names)}")
