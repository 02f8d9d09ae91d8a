"""Opening a model by name: one that ships, a diffusers folder, a single file or a model on the Hugging Face Hub."""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from text_encoder import TextEncoder
from unet import Denoiser, Experts
from vae import VAE

from ..assets import ASSETS, INDEX, shipped_models
from ..diffusion.process import Process
from ..errors import LatentDiffError, UnfinishedModelWarning
from .experts import BANDS, PIPELINE, open_unet
from .names import NO_PICKLES, PICKLES
from .scheduler import SAVED, read_scheduler
from .tensors import read_json
from .unfinished import RECORD, open_unfinished, raise_if_alone, unfinished_run

__all__ = ["Parts", "find_model", "open_folder", "open_model", "read_json"]

DEFAULT = "emoji-256"
# Supported pipelines, and the folders of VAE and text encoder in each.
FOLDERS = {
    "StableDiffusionPipeline": ("vae", "text_encoder"),
    "StableDiffusionImg2ImgPipeline": ("vae", "text_encoder"),
    "StableDiffusionInpaintPipeline": ("vae", "text_encoder"),
    "LDMTextToImagePipeline": ("vqvae", "bert"),
    PIPELINE: ("vae", "text_encoder"),
}
SUBFOLDERS = ("scheduler", "tokenizer", "unet", "unet_[0-9]*",
              *dict.fromkeys(folder for pair in FOLDERS.values() for folder in pair))  # fmt: skip
TEXT_FILES = (INDEX, BANDS, *(f"{folder}/*.{ending}" for folder in SUBFOLDERS for ending in ("json", "txt")))


class Parts(NamedTuple):
    """The parts of an open model."""

    vae: VAE
    unet: Denoiser
    text_encoder: TextEncoder
    process: Process
    progress: str | None = None  # of an unfinished run, such as "step 300 of 2000"


def open_model(
    name: str | Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
) -> Parts:
    """Open the model that `name` refers to; see LatentPipeline.from_pretrained."""
    path = find_model(name, variant)
    if not path.is_file():
        return open_folder(path, device=device, dtype=dtype, variant=variant)
    from .single_file import read_single_file  # importing it loads transformers

    vae, unet, text_encoder, scheduler = read_single_file(path, tokenizer=tokenizer, device=device, dtype=dtype)
    return Parts(_upcast(vae, dtype), unet, text_encoder, read_scheduler(scheduler, path))


def find_model(name: str | Path | None, variant: str | None = None) -> Path:
    """Return the folder or single file that `name` refers to; from the Hub, download it with the weights of `variant`.

    None means the default model that ships, even if there is a folder of the same name. For a training run, finished or
    not, it is the run's folder `model`.
    """
    if name is None:
        return ASSETS / DEFAULT
    if not isinstance(name, str | Path) or not str(name) or len(str(name)) > 1000 or "\0" in str(name):
        raise LatentDiffError(f"model {name!r:.100}: expected a folder, a file or a name on the Hub")
    path = Path(name).expanduser()
    if path.suffix in PICKLES:
        raise LatentDiffError(f"{path}: {NO_PICKLES}")
    if path.is_dir():
        inner = path / "model"  # of a training output
        is_run = (path / RECORD).is_file() or (inner / INDEX).is_file()
        return inner if is_run and not (path / INDEX).is_file() else path
    if unfinished_run(path) is not None:  # the folder is yet to be made
        return path
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LatentDiffError(f"{path}: expected a folder or a .safetensors file")
        return path
    if str(name) in shipped_models():
        return ASSETS / str(name)
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from text_encoder.files import fetch

        return fetch(name, TEXT_FILES, [f"{folder}/" for folder in SUBFOLDERS], variant)
    known = ", ".join(shipped_models()) or "none"
    raise LatentDiffError(f"{name}: no such folder or file; models that ship with the package: {known}")


def open_folder(folder: Path, *, device: torch.device, dtype: torch.dtype, variant: str | None = None) -> Parts:
    """Open the parts of a diffusers folder, or of the newest checkpoint of the run whose model it will be."""
    if (run := unfinished_run(folder)) is not None:
        return _open_run(run, device=device, dtype=dtype, variant=variant)
    if not (folder / INDEX).is_file():
        raise_if_alone(folder)
    index = read_json(folder / INDEX, "every model folder has one")
    kind = str(index.get("_class_name"))
    if kind not in FOLDERS:
        raise LatentDiffError(
            f"{folder / INDEX}: _class_name {kind!r} is not supported; use one of {', '.join(FOLDERS)}"
        )
    vae_folder, text_folder = FOLDERS[kind]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    process = read_scheduler(read_json(scheduler, "it defines how the model denoises"), scheduler, SAVED)
    vae = VAE.from_pretrained(folder / vae_folder, device=device, dtype=dtype, variant=variant)
    unet = open_unet(folder / "unet", device=device, dtype=dtype, variant=variant)
    check_bands(folder, kind, unet, process)
    if "LDMBertModel" in str(index.get(text_folder)):
        from .ldm_bert import load_ldm_bert

        encoder = load_ldm_bert(folder / text_folder, folder / "tokenizer", dtype=dtype)
    else:
        names = folder / text_folder, folder / "tokenizer"
        encoder = TextEncoder.from_pretrained(*names, dtype=dtype, variant=variant)
    if kind == "LDMTextToImagePipeline":
        encoder.use_attention_mask = False  # that pipeline passes none
    return Parts(_upcast(vae, dtype), unet, encoder.to(device), process)


def check_bands(folder: Path, kind: str, unet: Denoiser, process: Process) -> None:
    """Raise LatentDiffError unless the experts, or the single UNet, are what the other files of the model say."""
    if (kind == PIPELINE) != isinstance(unet, Experts):
        has = f"has no {BANDS}" if kind == PIPELINE else f"has a {BANDS}"
        raise LatentDiffError(f"{folder / INDEX}: _class_name is {kind!r}, but the folder {has}")
    steps = process.schedule.num_timesteps
    if isinstance(unet, Experts) and unet.edges[-1] != steps:
        raise LatentDiffError(
            f"{folder / BANDS}: its bands end at {unet.edges[-1]}, but the model has {steps} timesteps"
        )


def _open_run(run: Path, *, device: torch.device, dtype: torch.dtype, variant: str | None) -> Parts:
    """Open the newest checkpoint of an unfinished run, with a warning that says which it is."""
    vae, unet, encoder, process, average = open_unfinished(run, device=device, dtype=dtype, variant=variant)
    known = f"{run}: its model is not finished; these are the averaged weights of {average.progress}"
    warnings.warn("; ".join([known, *average.damages]), UnfinishedModelWarning, stacklevel=5)
    return Parts(_upcast(vae, dtype), unet, encoder, process, average.progress)


def _upcast(vae: VAE, dtype: torch.dtype) -> VAE:
    """Return the VAE in float32 if its config says that it overflows in float16."""
    return vae.float() if dtype == torch.float16 and vae.config.force_upcast else vae
