"""Reading and writing a model folder: `config.json` and one safetensors file, checked before anything is allocated."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import VAEError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of the dtypes that weights may have

Model = TypeVar("Model", bound=nn.Module)


def load_folder(
    folder: Path,
    build: Callable[[Mapping[str, Any]], Model],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Model:
    """The model that `build` makes of the folder's config, with the folder's weights, in evaluation mode."""
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise VAEError(f"dtype={dtype!r}: expected a floating point torch.dtype such as torch.bfloat16")
    values = read_config(folder)
    try:
        with torch.device("meta"):  # shapes only, no memory
            model = build(values)
    except VAEError as error:
        raise VAEError(f"{folder / CONFIG}: {error}") from None
    weights = read_weights(folder, model, device or "cpu", dtype)
    model.load_state_dict(weights, assign=True)
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def save_folder(
    model: nn.Module, values: Mapping[str, Any], folder: Path, facts: Mapping[str, str] | None = None
) -> None:
    """Write both files; each appears under its name only when it is whole.

    Raises:
        VAEError: the folder cannot be written to.
    """
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}  # files know no channels-last
    partial = {name: folder / f"{name}.partial" for name in (WEIGHTS, CONFIG)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial[WEIGHTS], metadata={**(facts or {}), "format": "pt"})
        partial[CONFIG].write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, path in partial.items():
            os.replace(path, folder / name)
    except (OSError, SafetensorError) as error:
        raise VAEError(f"{folder}: cannot be written ({error})") from error
    finally:
        for path in partial.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)


def read_config(folder: Path) -> Mapping[str, Any]:
    """The folder's `config.json` as a dictionary."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise VAEError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
    if not path.is_file():
        raise VAEError(f"{path}: no such file; a VAE folder has {CONFIG} and {WEIGHTS}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also undecodable bytes and endless numbers
        raise VAEError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise VAEError(f"{path}: holds a {type(values).__name__}; expected an object with the configuration")
    return values


def read_weights(folder: Path, model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The folder's tensors, after their names, shapes and dtypes were compared with the model's."""
    path = folder / WEIGHTS
    if not path.is_file():
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json"))
        advice = "; pickled .bin files are never opened: re-save them as safetensors" if [*folder.glob("*.bin")] else ""
        raise VAEError(f"{path}: no such file; the folder has {', '.join(others)}{advice}")
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            stored = {current_name(name): name for name in file.keys()}  # noqa: SIM118 (not a dict)
            found = {name: file.get_slice(stored[name]) for name in stored}
            _complain(path, "lacks", expected.keys() - found.keys())
            _complain(path, "has, and this VAE has not,", found.keys() - expected.keys())
            for name, shape in expected.items():
                if found[name].get_shape() != shape:
                    raise VAEError(f"{path}: {name} has shape {found[name].get_shape()}; the config says {shape}")
                if found[name].get_dtype() not in FLOATS:
                    raise VAEError(f"{path}: {name} is {found[name].get_dtype()}; expected one of {sorted(FLOATS)}")
            # Copied, because a tensor that stays mapped to the file changes with the file.
            return {name: file.get_tensor(stored[name]).to(dtype, copy=True) for name in expected}
    except SafetensorError as error:
        raise VAEError(f"{path}: damaged or not a safetensors file ({error})") from None


def current_name(name: str) -> str:
    """Today's name of a tensor: files of 2022, Stable Diffusion 1.x among them, name the attention layers otherwise."""
    parts = name.split(".")
    if "attentions" in parts:
        parts = [FORMER_NAMES.get(part, part) for part in parts]
    return ".".join(parts)


def _complain(path: Path, problem: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
        raise VAEError(f"{path}: {problem} {len(names)} tensor{'s' if len(names) > 1 else ''}: {shown}")
