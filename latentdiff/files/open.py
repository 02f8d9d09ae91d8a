"""Opening a whole model by name: one that ships, a folder in diffusers' layout, a single file, or from the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from text_encoder import TextEncoder, TextEncoderError
from unet import UNet
from vae import VAE

from ..assets import ASSETS, INDEX, shipped_models
from ..diffusion.process import Process
from ..errors import LatentDiffError
from .scheduler import read_scheduler

DEFAULT = "emoji-64"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# Pipelines whose parts these are, and the folders of VAE and text encoder in each.
FOLDERS = {
    "StableDiffusionPipeline": ("vae", "text_encoder"),
    "StableDiffusionImg2ImgPipeline": ("vae", "text_encoder"),
    "StableDiffusionInpaintPipeline": ("vae", "text_encoder"),
    "LDMTextToImagePipeline": ("vqvae", "bert"),
}
NEEDED = ("scheduler", "tokenizer", "unet", *dict.fromkeys(folder for pair in FOLDERS.values() for folder in pair))


class Parts(NamedTuple):
    """A model, opened."""

    vae: VAE
    unet: UNet
    text_encoder: TextEncoder
    process: Process


def open_model(
    name: str | Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
) -> Parts:
    """Open what `name` means, as LatentPipeline.from_pretrained says.

    Raises:
        LatentDiffError, VAEError, UNetError, TextEncoderError: what is not there, damaged, or not supported.
    """
    place = find_model(name, variant)
    if place.is_dir():
        return open_folder(place, device=device, dtype=dtype, variant=variant)
    from .single_file import read_single_file

    vae, unet, text_encoder, scheduler = read_single_file(place, tokenizer=tokenizer, device=device, dtype=dtype)
    return Parts(_upcast(vae, dtype), unet, text_encoder, read_scheduler(scheduler, place))


def find_model(name: str | Path | None, variant: str | None = None) -> Path:
    """The folder or single file that a name means; from the hub it is downloaded, with the weights of a variant.

    None is the model that ships, also where a folder of its name is at hand.

    Raises:
        LatentDiffError: nothing of that name.
    """
    if name is None:
        return ASSETS / DEFAULT
    if not isinstance(name, str | Path) or not str(name) or len(str(name)) > 1000 or "\0" in str(name):
        raise LatentDiffError(f"model {name!r:.100}: expected a folder, a file, or a name")
    path = Path(name).expanduser()
    if path.suffix in PICKLES:
        raise LatentDiffError(
            f"{path}: pickled weights are never opened, they can run code; where you trust the file, load it with "
            "torch and save its state dict with safetensors.torch.save_file, then open that"
        )
    if path.is_dir():
        inner = path / "model"  # of a training's output
        if not (path / INDEX).is_file() and (path / "run.json").is_file() and not (inner / INDEX).is_file():
            raise LatentDiffError(
                f"{path}: no finished model there; give the training's command again to go on with it"
            )
        return inner if not (path / INDEX).is_file() and (inner / INDEX).is_file() else path
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LatentDiffError(f"{path}: expected a folder or a .safetensors file")
        return path
    if str(name) in shipped_models():
        return ASSETS / str(name)
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name, variant)
    known = ", ".join(shipped_models()) or "none"
    raise LatentDiffError(f"{name}: no such folder or file; the models that come with the package: {known}")


def open_folder(folder: Path, *, device: torch.device, dtype: torch.dtype, variant: str | None = None) -> Parts:
    """The parts in a folder of diffusers' layout.

    Raises:
        LatentDiffError, VAEError, UNetError, TextEncoderError: what is missing, damaged, or not supported.
    """
    index = read_json(folder / INDEX, "a model's folder has one")
    kind = str(index.get("_class_name"))
    if kind not in FOLDERS:
        raise LatentDiffError(f"{folder / INDEX}: _class_name {kind!r} is not supported; only {', '.join(FOLDERS)} are")
    vae_folder, text_folder = FOLDERS[kind]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    process = read_scheduler(read_json(scheduler, "it says how the model denoises"), scheduler)
    vae = VAE.from_pretrained(folder / vae_folder, device=device, dtype=dtype, variant=variant)
    unet = UNet.from_pretrained(folder / "unet", device=device, dtype=dtype, variant=variant)
    if "LDMBertModel" in str(index.get(text_folder)):
        from .ldm_bert import load_ldm_bert

        encoder = load_ldm_bert(folder / text_folder, folder / "tokenizer", dtype=dtype)
    else:
        encoder = _text_encoder(folder / text_folder, folder / "tokenizer", dtype, variant)
    if kind == "LDMTextToImagePipeline":
        encoder.use_attention_mask = False  # that pipeline passes none
    return Parts(_upcast(vae, dtype), unet, encoder.to(device), process)


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        LatentDiffError: there is no such file, or it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LatentDiffError(f"{path}: no such file; {why}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LatentDiffError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise LatentDiffError(f"{path}: holds a {type(values).__name__}; expected an object")
    return values


def _text_encoder(folder: Path, tokenizer: Path, dtype: torch.dtype, variant: str | None) -> TextEncoder:
    if not folder.is_dir():
        raise TextEncoderError(f"{folder}: no such folder")
    return TextEncoder.from_pretrained(folder, tokenizer, dtype=dtype, variant=variant)


def _upcast(vae: VAE, dtype: torch.dtype) -> VAE:
    """float32 for a VAE that says it overflows in float16."""
    return vae.float() if dtype == torch.float16 and vae.config.force_upcast else vae


def _from_hub(name: str, variant: str | None) -> Path:
    """A model's folder, downloaded or in the cache: what its parts need of it; no pickles, no code."""
    from huggingface_hub import snapshot_download

    texts = [INDEX, *(f"{folder}/*.{ending}" for folder in NEEDED for ending in ("json", "txt"))]
    weights = ["*/*.safetensors"] if variant is None else [f"*/*.{variant}.safetensors", f"*/*.{variant}-*.safetensors"]
    kept = texts + [pattern.replace("*", folder, 1) for pattern in weights for folder in NEEDED]
    try:
        folder = snapshot_download(name, allow_patterns=kept, ignore_patterns=None if variant else "*.*.safetensors")
        parts = [path.parent for path in Path(folder).glob("*/config.json")]
        if not all(any(part.glob("*.safetensors")) for part in parts):  # no plain one there: its only variant is opened
            folder = snapshot_download(name, allow_patterns=kept)
        return Path(folder)
    except Exception as error:  # the hub's own, the network's, the disk's: all mean that it is not there
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LatentDiffError(f"{name}: no such folder, and it cannot be fetched from the hub ({reason})") from None
