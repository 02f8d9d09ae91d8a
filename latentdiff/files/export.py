"""Writing a model: the folder that diffusers' StableDiffusionPipeline opens, or a single file; card, upload."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from text_encoder import TextEncoder
from unet import UNet
from vae import VAE

from ..assets import INDEX
from ..diffusion.process import Process
from ..errors import LatentDiffError, errors_of
from .card import model_card
from .open import find_model, open_model
from .scheduler import scheduler_config
from .tensors import staged, to_json

DIFFUSERS_VERSION = "0.42.1"  # whose layout this is; the inpainting pipeline does not open a model that names none


def save_model(
    folder: Path,
    *,
    vae: VAE,
    unet: UNet,
    text_encoder: TextEncoder,
    process: Process,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write all parts; model_index.json comes last, so a folder that has one is whole.

    Args:
        folder: where to.
        vae: between pixels and latents.
        unet: predicts from noisy latents.
        text_encoder: prompts to features.
        process: how the model denoises.
        dtype: that weights are cast to on the way; None: as they are.
        variant: for the names of the weight files, such as `fp16`.
        max_shard_bytes: of the UNet's and the VAE's weights, above which they are split over several files.

    Raises:
        LatentDiffError, VAEError, UNetError, TextEncoderError: the prediction has no name in diffusers, or the folder
            cannot be written.
    """
    scheduler = scheduler_config(process)
    with suppress(OSError):
        (folder / INDEX).unlink(missing_ok=True)  # until the folder is whole again
    vae.save_pretrained(folder / "vae", dtype=dtype, variant=variant, max_shard_bytes=max_shard_bytes)
    unet.save_pretrained(folder / "unet", dtype=dtype, variant=variant, max_shard_bytes=max_shard_bytes)
    text_encoder.save_pretrained(folder / "text_encoder", folder / "tokenizer", dtype=dtype, variant=variant)
    _write(folder / "scheduler" / "scheduler_config.json", to_json(scheduler))
    _write(folder / INDEX, to_json(model_index(text_encoder)))


def model_index(text_encoder: TextEncoder) -> dict[str, Any]:
    """What diffusers loads each part with."""
    nothing = [None, None]
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": nothing,
        "image_encoder": nothing,
        "requires_safety_checker": False,
        "safety_checker": nothing,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", type(text_encoder.model).__name__],
        "tokenizer": ["transformers", type(text_encoder.tokenizer).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def export_model(
    source: str | Path,
    output: Path,
    *,
    single: bool = False,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    max_shard_bytes: int | None = None,
    license: str = "other",
    data: str = "",
) -> Path:
    """Open a model and write it again, with a card.

    Args:
        source: anything that `LatentPipeline.from_pretrained` opens.
        output: folder, or file.
        single: one file in the original layout instead of diffusers' folder; the card is part of its header.
        dtype: of the weights.
        variant: for the names of the weight files.
        max_shard_bytes: size of a weight file above which it is split.
        license: of the weights.
        data: what the card says of the pictures and their license.

    Raises:
        LatentDiffError: the source cannot be opened, or the output not be written.
    """
    if single and output.suffix != ".safetensors":
        raise LatentDiffError(f"{output}: a single file's name ends in .safetensors")
    if single and (variant or max_shard_bytes is not None):
        raise LatentDiffError("a single file has no variant and no shards")
    opened = find_model(source)
    if opened.resolve() in (output.resolve(), *(output / "model").resolve().parents, (output / "model").resolve()):
        raise LatentDiffError(f"{output}: the model itself lies there; choose another output")
    if not single and output.is_dir() and any(output.iterdir()):
        raise LatentDiffError(f"{output}: is not empty; choose another output, or delete it")
    parts = open_model(source, device=torch.device("cpu"), dtype=torch.float32)
    models: dict[str, Any] = {"vae": parts.vae, "unet": parts.unet, "text_encoder": parts.text_encoder}
    size = (parts.unet.config.sample_size or 32) * parts.vae.config.downsampling
    run = opened.parent if (opened.parent / "run.json").is_file() else None
    card = model_card(models, parts.process, title=output.stem if single else output.name, image_size=size, run=run,
                      license=license, data=data)  # fmt: skip
    if single:
        from .single_file import write_single_file

        facts = {"latentdiff.card": card, "modelspec.license": license}
        write_single_file(output, **models, scheduler=scheduler_config(parts.process), facts=facts, dtype=dtype)
        return output
    save_model(output, **models, process=parts.process, dtype=dtype, variant=variant, max_shard_bytes=max_shard_bytes)
    _write(output / "README.md", card)
    return output


def push_folder(folder: Path, name: str, *, token: str | None = None, private: bool = False) -> str:
    """Upload a model's folder to the Hugging Face hub; returns its address.

    Raises:
        LatentDiffError: no network, no permission, or no such name.
    """
    from huggingface_hub import HfApi

    with errors_of(LatentDiffError, f"{name}: cannot be uploaded", Exception):  # the hub's own, the network's
        api = HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a latentdiff model"))


def _write(path: Path, text: str) -> None:
    with staged(path.parent, path.name) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")
