"""Writing a trained model as the folder that diffusers' StableDiffusionPipeline opens."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from text_encoder import TextEncoder
from unet import UNet
from vae import VAE

from ..diffusion.process import Process
from ..errors import LatentDiffError
from .scheduler import scheduler_config

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
        (folder / "model_index.json").unlink(missing_ok=True)  # until the folder is whole again
    vae.save_pretrained(folder / "vae", dtype=dtype, variant=variant, max_shard_bytes=max_shard_bytes)
    unet.save_pretrained(folder / "unet", dtype=dtype, variant=variant, max_shard_bytes=max_shard_bytes)
    text_encoder.save_pretrained(folder / "text_encoder", folder / "tokenizer", dtype=dtype, variant=variant)
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write(folder / "model_index.json", model_index(text_encoder))


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


def _write(path: Path, values: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise LatentDiffError(f"{path}: cannot be written ({error})") from None
