"""A whole model in one safetensors file, in the layout of the original latent diffusion and Stable Diffusion.

Files written here carry in their header all that rebuilds them: configs, schedule, tokenizer. From files of others the
configs are told from names and shapes; their tokenizer must be given.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from text_encoder import TextEncoder, TextEncoderError
from text_encoder.files import MODELS, REFUSED, load_tokenizer, quiet, save_tokenizer
from unet import UNet, UNetConfig, UNetError
from vae import VAE, VAEConfig, VAEError

from ..errors import LatentDiffError
from .names import IGNORED, Layout, Plan, infer_plan, make_layout
from .scheduler import read_scheduler

OURS = "latentdiff."  # our keys in the header: what rebuilds each part, as JSON
MAX_HEADER = 32 * 2**20  # bytes; names and shapes take a few hundred thousand, a tokenizer a few million
FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of the dtypes that weights may have
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
DROPOUTS = {"dropout", "activation_dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"}
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
PICKLE_STARTS = (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
NO_PICKLES = (
    "a pickle, which can run code when it is opened, so it never is; where you trust it, convert it to safetensors: "
    "python -c \"import sys, torch; from safetensors.torch import save_file; d = torch.load(sys.argv[1], 'cpu', "
    "weights_only=True); save_file({k: v.clone().contiguous() for k, v in d.get('state_dict', d).items() "
    "if hasattr(v, 'shape')}, sys.argv[2])\" model.ckpt model.safetensors"
)


class Parts(NamedTuple):
    """The parts of a model."""

    vae: VAE
    unet: UNet
    text_encoder: TextEncoder
    scheduler: dict[str, Any]  # contents of a `scheduler_config.json`


def write_single_file(
    path: Path,
    *,
    vae: VAE,
    unet: UNet,
    text_encoder: TextEncoder,
    scheduler: dict[str, Any],
    facts: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write all parts to one file, which appears under its name only when it is whole.

    Args:
        path: ends in `.safetensors`.
        vae: the autoencoder.
        unet: the denoiser.
        text_encoder: BERT or CLIP, with its tokenizer.
        scheduler: contents of a `scheduler_config.json`.
        facts: what else is known of the model, for the header; `modelspec.*` among them replaces what is written here.
        dtype: what the weights are cast to; None leaves them as they are.

    Raises:
        LatentDiffError: the name has another ending, the scheduler is not supported, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise LatentDiffError(f"{path}: a single file is safetensors; expected a name that ends in .safetensors")
    parts = Parts(vae, unet, text_encoder, scheduler)
    schedule = read_scheduler(scheduler, path).schedule
    tensors = {"betas": schedule.betas.float(), "alphas_cumprod": schedule.alpha_bar.float()}
    text: Any = text_encoder.model
    for model, names in make_layout(unet, vae, text, text.config.model_type):
        for name, tensor in model.state_dict().items():
            if model is vae and tensor.dim() == 2:
                tensor = tensor[:, :, None, None]  # the original's attention there is made of 1x1 convolutions
            tensors[names[name]] = tensor.to(dtype or tensor.dtype).contiguous()  # files know no channels-last
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=_header(parts, path.stem, facts or {}))
        os.replace(partial, path)
    except (OSError, SafetensorError, TextEncoderError) as error:
        raise LatentDiffError(f"{path}: cannot be written ({error})") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_single_file(
    path: Path,
    *,
    tokenizer: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Parts:
    """Open a single file, in evaluation mode. Nothing in it is ever unpickled or run.

    Args:
        path: a safetensors file; of this library, or Stable Diffusion 1.x or 2.x, or LDM-text2im.
        tokenizer: folder of its tokenizer; files written here have their own.
        device: where the weights go; the CPU by default.
        dtype: what they are cast to; float32 by default.

    Raises:
        LatentDiffError: the file is missing, a pickle or damaged, describes a model that is not supported, or a tensor
            is missing, extra, misshapen or not of floating point. No weight is read before all tensors were checked.
    """
    path, dtype = Path(path), torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LatentDiffError(f"dtype={dtype!r}: expected a floating point torch.dtype such as torch.bfloat16")
    _check_header(path)
    with _errors_of(path), safe_open(path, framework="pt", device=str(device or "cpu")) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = file.metadata() or {}
        if f"{OURS}unet" in header:
            plan = _own_plan(header)
        else:
            has_scale = shapes.get("scale_factor") == []  # LDM measured it where Stable Diffusion has it in a config
            plan = infer_plan(header, shapes, float(file.get_tensor("scale_factor")) if has_scale else 0.18215)
        read_scheduler(plan.scheduler, "its scheduler")  # refuses what is not supported
        loaded_tokenizer = _load_tokenizer(plan, tokenizer)
        with torch.device("meta"):  # shapes only, no memory
            unet, vae, text = UNet(plan.unet), VAE(plan.vae), _new_text_model(plan.text, len(shapes))
        layout = make_layout(unet, vae, text, plan.layout)
        _check_tensors(file, shapes, layout)
        weights = [_read_weights(file, model, names, dtype) for model, names in layout]
        unet.load_state_dict(weights[0], assign=True)
        vae.load_state_dict(weights[1], assign=True)
        with quiet():  # also makes the tables of positions, which are in no file
            text = type(text).from_pretrained(None, config=text.config, state_dict=weights[2], dtype=dtype)
        max_length = min(loaded_tokenizer.model_max_length, text.config.max_position_embeddings)
        masked = plan.text.get("use_attention_mask", False)
        encoder = TextEncoder(text, loaded_tokenizer, max_length, use_attention_mask=bool(masked))
    for model in (unet, vae):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Parts(vae.eval(), unet.eval(), encoder.to(device or "cpu").eval(), plan.scheduler)


def _check_header(path: Path) -> None:
    """Look at a file's first bytes: what safetensors lets through, or says badly."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length, size = int.from_bytes(start, "little"), os.fstat(file.fileno()).st_size
            text = file.read(length) if length <= min(MAX_HEADER, size - 8) else b""
    except OSError as error:
        raise LatentDiffError(f"{path}: cannot be opened ({error.strerror})") from None
    if path.suffix in PICKLES or (not text and start[:2] in PICKLE_STARTS):
        raise LatentDiffError(f"{path}: {NO_PICKLES}")
    if not text:
        raise LatentDiffError(
            f"{path}: damaged or not a safetensors file (of {size} bytes, with a header of {length}; at most "
            f"{MAX_HEADER} are read)"
        )
    twice: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)

    try:
        json.loads(text, object_pairs_hook=note)
    except (ValueError, RecursionError) as error:
        raise LatentDiffError(f"{path}: damaged or not a safetensors file (its header is not JSON: {error})") from None
    if twice:
        raise LatentDiffError(f"{path}: damaged: its header has the key {twice[0]!r} twice")


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file, in one line that names the file."""
    try:
        yield
    except (KeyError, IndexError) as error:
        raise LatentDiffError(f"{path}: not a whole latent diffusion model: no usable tensor {error}") from None
    except SafetensorError as error:
        raise LatentDiffError(f"{path}: damaged or not a safetensors file ({error})") from None
    except (LatentDiffError, UNetError, VAEError, TextEncoderError, OSError) as error:
        raise LatentDiffError(f"{path}: {error}") from None


def _header(parts: Parts, title: str, facts: Mapping[str, str]) -> dict[str, str]:
    """What other programs look for, and all that rebuilds the parts."""
    encoder, text = parts.text_encoder, parts.text_encoder.model
    text_config = json.loads(text.config.to_json_string(use_diff=False))  # type: ignore[union-attr,operator]
    with TemporaryDirectory() as folder:
        save_tokenizer(encoder.tokenizer, Path(folder), encoder.max_length)
        tokenizer = {name: (Path(folder) / name).read_bytes().decode() for name in TOKENIZER_FILES}
    values: dict[str, Any] = {
        "unet": parts.unet.config.to_diffusers(),
        "vae": parts.vae.config.to_diffusers(),
        "text_encoder": {key: value for key, value in text_config.items() if not key.startswith("_")}
        | {"use_attention_mask": encoder.use_attention_mask},
        "scheduler": parts.scheduler,
        "tokenizer": tokenizer,
    }
    prediction = parts.scheduler.get("prediction_type", "epsilon")
    side = (parts.unet.config.sample_size or 0) * parts.vae.config.downsampling
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.architecture": "latent-diffusion",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        **({"modelspec.resolution": f"{side}x{side}"} if side else {}),
        **facts,
        "format": "pt",
        **{OURS + name: json.dumps(value) for name, value in values.items()},
    }


def _own_plan(header: Mapping[str, str]) -> Plan:
    """What the header of a file written here says."""
    parts: dict[str, Any] = {}
    for name in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
        try:
            parts[name] = json.loads(header.get(OURS + name, "null"))
        except (ValueError, RecursionError) as error:
            raise LatentDiffError(f"{OURS}{name} in its header is not JSON ({error})") from None
        if not isinstance(parts[name], dict):
            raise LatentDiffError(f"{OURS}{name} in its header is {parts[name]!r}; expected an object")
    for name, text in parts["tokenizer"].items():
        if name not in TOKENIZER_FILES or not isinstance(text, str):
            raise LatentDiffError(f"{OURS}tokenizer in its header has {name!r}; expected {', '.join(TOKENIZER_FILES)}")
    return Plan(
        UNetConfig.from_diffusers(parts["unet"]),
        VAEConfig.from_diffusers(parts["vae"]),
        parts["text_encoder"],
        str(parts["text_encoder"].get("model_type")),
        parts["scheduler"],
        parts["tokenizer"],
    )


def _load_tokenizer(plan: Plan, folder: str | Path | None) -> Any:
    kind = "clip" if "clip" in plan.layout else "bert"
    if folder is not None:
        return load_tokenizer(folder, folder, kind)[0]
    if not plan.tokenizer:
        raise LatentDiffError(f"has no tokenizer: give the folder of its {kind.upper()} tokenizer as tokenizer=")
    with TemporaryDirectory() as temporary:
        for name, text in plan.tokenizer.items():
            (Path(temporary) / name).write_bytes(text.encode())
        return load_tokenizer(temporary, temporary, kind)[0]


def _new_text_model(values: Mapping[str, Any], most_layers: int) -> Any:
    """The text encoder of a transformers config, without dropout; of the known classes only."""
    kind = values.get("model_type")
    if kind not in (*MODELS, "ldmbert"):
        raise LatentDiffError(f"its text encoder's model_type is {kind!r}; choose one of {', '.join(MODELS)}, ldmbert")
    if refused := [key for key in REFUSED if values.get(key)]:
        raise LatentDiffError(f"its text encoder's config has {refused[0]!r}, which is refused")
    for key in ("num_hidden_layers", "encoder_layers"):  # bounded, because every one is built
        if not isinstance(layers := values.get(key, 0), int) or layers > most_layers:
            raise LatentDiffError(f"its text encoder's config has {key}={layers!r}; the file has {most_layers} tensors")
    if kind == "ldmbert":
        from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel as model_class
    else:
        model_class = MODELS[kind]
    try:
        config = model_class.config_class.from_dict(dict(values))
        config.update(dict.fromkeys(DROPOUTS & vars(config).keys(), 0.0))
        return model_class(config)
    except Exception as error:  # whatever transformers makes of a bad config
        raise LatentDiffError(f"its text encoder's config cannot be used ({' '.join(str(error).split())})") from None


def _check_tensors(file: Any, shapes: Mapping[str, list[int]], layout: Layout) -> None:
    """Compare names, shapes and dtypes with what the models have."""
    expected: dict[str, list[list[int]]] = {}  # the shapes that each may have
    for model, names in layout:
        for ours, tensor in model.state_dict().items():
            name, shape = names[ours], list(tensor.shape)
            if ".in_proj_" in name:  # OpenCLIP's queries, keys and values in one
                shape[0] *= 3
            is_conv = isinstance(model, VAE) and len(shape) == 2  # 1x1 in the original
            expected[name] = [[*shape, 1, 1], shape] if is_conv else [shape]
    extra = {name for name in shapes.keys() - expected.keys() if not name.startswith(IGNORED)}
    for problem, names_ in (("lacks", expected.keys() - shapes.keys()), ("has, and this model has not,", extra)):
        if names_:
            shown = ", ".join(sorted(names_)[:3]) + (", …" if len(names_) > 3 else "")
            raise LatentDiffError(f"{problem} {len(names_)} tensor{'s' if len(names_) > 1 else ''}: {shown}")
    for name, allowed in expected.items():
        if shapes[name] not in allowed:
            raise LatentDiffError(f"{name} has shape {shapes[name]}; the config says {allowed[0]}")
        if (dtype := file.get_slice(name).get_dtype()) not in FLOATS:
            raise LatentDiffError(f"{name} is {dtype}; expected one of {', '.join(sorted(FLOATS))}")


def _read_weights(file: Any, model: nn.Module, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in model.state_dict().items():
        stored = file.get_tensor(names[name])
        if ".in_proj_" in names[name]:
            stored = stored.chunk(3)["qkv".index(name.partition("_proj.")[0][-1])]
        # Copied, because a tensor that stays mapped to the file changes with the file.
        weights[name] = stored.reshape(tensor.shape).to(dtype, copy=True)
    return weights
