"""A model in one safetensors file, in the layout of the original latent diffusion and Stable Diffusion.

The header of a file written here has all it takes to rebuild the model: configs, schedule and tokenizer. For
third-party files, the configs are inferred from names and shapes, and the tokenizer must be given.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from text_encoder import TextEncoder
from text_encoder.files import fill_model, load_tokenizer, new_model, save_tokenizer
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

from ..errors import LatentDiffError
from .foreign import kind_of, usual_names
from .names import IGNORED, NO_PICKLES, PICKLES, Layout, Plan, infer_plan, make_layout
from .scheduler import read_scheduler
from .tensors import Stored, check_dtype, check_tensors, open_file, staged

PREFIX = "latentdiff."  # of our header keys, whose values are JSON
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MAX_HEADER = 32 * 2**20  # bytes, for a header that contains a tokenizer
PICKLE_MAGIC = (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


class Parts(NamedTuple):
    """The parts read from a single file."""

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
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write all parts to a `.safetensors` file, which appears only when it is complete.

    `scheduler` has the contents of a `scheduler_config.json`; `metadata` is added to the header and may replace
    `modelspec.*` keys; `dtype` None keeps the weights as they are.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise LatentDiffError(f"{path}: expected a name ending in .safetensors")
    parts = Parts(vae, unet, text_encoder, scheduler)
    schedule = read_scheduler(scheduler, path).schedule
    tensors = {"betas": schedule.betas.float(), "alphas_cumprod": schedule.alpha_bar.float()}
    text: Any = text_encoder.model
    for model, names in make_layout(unet, vae, text, text.config.model_type):
        for name, tensor in model.state_dict().items():
            if model is vae and tensor.dim() == 2:
                tensor = tensor[:, :, None, None]  # the original's VAE attention uses 1x1 convolutions
            tensors[names[name]] = tensor.to(dtype or tensor.dtype).contiguous()  # files cannot be channels-last
    with staged(path.parent, path.name) as staging:
        save_file(tensors, staging / path.name, metadata=_header(parts, path.stem, metadata or {}))


def read_single_file(
    path: Path,
    *,
    tokenizer: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Parts:
    """Open a safetensors file of this library, Stable Diffusion 1.x or 2.x, or LDM-text2im, in evaluation mode.

    `tokenizer` is a folder; files written here contain theirs. Weights go to the CPU in float32 by default. Nothing is
    unpickled or executed, and no weight is read before the names, shapes and dtypes of all tensors have been checked.
    """
    path, dtype = Path(path), check_dtype(dtype)
    stored, header = _open(path, device)
    with _naming_errors(path):
        if f"{PREFIX}unet" in header:
            plan = _plan_from_header(header)
        else:
            if (kind := kind_of(stored)) is not None:
                raise LatentDiffError(f"{path}: this is {kind}")
            stored = usual_names(stored)
            shapes = {name: tensor.shape for name, tensor in stored.items()}
            is_stored = shapes.get("scale_factor") == []  # LDM stores it; Stable Diffusion has it in a config
            scale = float(stored["scale_factor"].read(torch.float64)) if is_stored else 0.18215
            plan = infer_plan(header, shapes, scale)
        read_scheduler(plan.scheduler, "its scheduler")  # raises if it is not supported
        loaded_tokenizer = _load_tokenizer(plan, tokenizer)
        with torch.device("meta"):  # shapes only, no memory
            unet, vae, text = UNet(plan.unet), VAE(plan.vae), _new_text_model(plan.text, len(stored))
        layout = make_layout(unet, vae, text, plan.layout)
        check_tensors(path, *_expected(stored, layout), "model")
        weights = [_read_weights(stored, model, names, dtype) for model, names in layout]
        unet.load_state_dict(weights[0], assign=True)
        vae.load_state_dict(weights[1], assign=True)
        text, _ = fill_model(text, weights[2], dtype)
        max_length = min(loaded_tokenizer.model_max_length, text.config.max_position_embeddings)
        use_mask = plan.text.get("use_attention_mask", False)
        encoder = TextEncoder(text, loaded_tokenizer, max_length, use_attention_mask=bool(use_mask))
    vae.facts = {name: header[key] for name in VAE.known_facts if (key := f"{PREFIX}vae.{name}") in header}
    for model in (unet, vae):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Parts(vae.eval(), unet.eval(), encoder.to(device or "cpu").eval(), plan.scheduler)


def _open(path: Path, device: torch.device | str | None) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the tensors and metadata of a file; raise if it is a pickle, whatever its name."""
    if path.suffix in PICKLES:
        raise LatentDiffError(f"{path}: {NO_PICKLES}")
    with suppress(OSError), path.open("rb") as raw:
        start = raw.read(8)
        if start[:2] in PICKLE_MAGIC and int.from_bytes(start, "little") > MAX_HEADER:
            raise LatentDiffError(f"{path}: {NO_PICKLES}")
    return open_file(path, device, MAX_HEADER)


@contextmanager
def _naming_errors(path: Path) -> Iterator[None]:
    """Turn any error in a file into one line that names the file."""
    try:
        yield
    except LookupError as error:
        raise LatentDiffError(f"{path}: not a complete latent diffusion model: no usable tensor {error}") from None
    except (LatentDiffError, SafetensorError, OSError) as error:
        named = str(error).startswith(str(path))
        raise LatentDiffError(str(error) if named else f"{path}: {error}") from None


def _header(parts: Parts, title: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the modelspec keys that other programs read, and everything to rebuild the parts."""
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
        **metadata,
        "format": "pt",
        **{PREFIX + name: json.dumps(value) for name, value in values.items()},
        **{f"{PREFIX}vae.{name}": fact for name, fact in parts.vae.facts.items()},
    }


def _plan_from_header(header: Mapping[str, str]) -> Plan:
    """Read the plan from the header of a file written here."""
    parts: dict[str, Any] = {}
    for name in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
        try:
            parts[name] = json.loads(header.get(PREFIX + name, "null"))
        except (ValueError, RecursionError) as error:
            raise LatentDiffError(f"{PREFIX}{name} in its header is not JSON ({error})") from None
        if not isinstance(parts[name], dict):
            raise LatentDiffError(f"{PREFIX}{name} in its header is {parts[name]!r}; expected an object")
    for name, text in parts["tokenizer"].items():
        if name not in TOKENIZER_FILES or not isinstance(text, str):
            raise LatentDiffError(
                f"{PREFIX}tokenizer in its header has {name!r}; expected {', '.join(TOKENIZER_FILES)}"
            )
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


def _new_text_model(values: Mapping[str, Any], max_layers: int) -> Any:
    where = "its text encoder's config"
    if values.get("model_type") != "ldmbert":
        return new_model(values, max_layers, where)
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel

    return new_model(values, max_layers, where, LDMBertModel)


def _expected(stored: Mapping[str, Stored], layout: Layout) -> tuple[dict[str, Stored], dict[str, list[list[int]]]]:
    """Return the tensors to check, without the ignored ones, and the shapes allowed for each expected tensor."""
    expected: dict[str, list[list[int]]] = {}
    for model, names in layout:
        for ours, tensor in model.state_dict().items():
            name, shape = names[ours], list(tensor.shape)
            if ".in_proj_" in name:  # OpenCLIP stacks queries, keys and values
                shape[0] *= 3
            is_conv = isinstance(model, VAE) and len(shape) == 2  # a 1x1 convolution in the original
            expected[name] = [[*shape, 1, 1], shape] if is_conv else [shape]
    checked = {name: tensor for name, tensor in stored.items() if name in expected or not name.startswith(IGNORED)}
    return checked, expected


def _read_weights(
    stored: Mapping[str, Stored], model: nn.Module, names: Mapping[str, str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read a model's tensors, under our names."""
    weights = {}
    for name, tensor in model.state_dict().items():
        found = stored[names[name]]
        if ".in_proj_" in found.name:
            third = found.file.get_tensor(found.name).chunk(3)["qkv".index(name.partition("_proj.")[0][-1])]
            weights[name] = third.to(dtype, copy=True)
        else:
            weights[name] = found.read(dtype).reshape(tensor.shape)
    return weights
