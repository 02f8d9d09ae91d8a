"""Writing a trained model as the folder that diffusers' StableDiffusionPipeline opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text_encoder import TextEncoder
from unet import UNet
from vae import VAE

from ..errors import LatentDiffError

if TYPE_CHECKING:
    from ..sections import DiffusionSection

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # ours: diffusers'
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def save_model(folder: Path, *, vae: VAE, unet: UNet, text_encoder: TextEncoder, diffusion: DiffusionSection) -> None:
    """Write all parts; model_index.json comes last, so a folder that has one is whole.

    Raises:
        LatentDiffError: the prediction has no name in diffusers, or the folder cannot be written.
    """
    scheduler = scheduler_config(diffusion)
    vae.save_pretrained(folder / "vae")
    unet.save_pretrained(folder / "unet")
    text_encoder.save_pretrained(folder / "text_encoder", folder / "tokenizer")
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write(folder / "model_index.json", model_index(text_encoder))


def scheduler_config(diffusion: DiffusionSection) -> dict[str, Any]:
    """The noise schedule as diffusers' DDIMScheduler reads it.

    Raises:
        LatentDiffError: the prediction is `mean`, which diffusers does not know.
    """
    if diffusion.prediction not in PREDICTIONS:
        raise LatentDiffError(
            f"diffusion.prediction={diffusion.prediction}: diffusers has no scheduler for it; "
            f"models with {', '.join(PREDICTIONS)} can be written"
        )
    schedule = diffusion.build()
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": BETA_SCHEDULES[diffusion.schedule],
        "beta_start": diffusion.beta_start or float(schedule.named(diffusion.schedule).betas[0]),
        "beta_end": diffusion.beta_end or float(schedule.named(diffusion.schedule).betas[-1]),
        "num_train_timesteps": diffusion.num_timesteps,
        "prediction_type": PREDICTIONS[diffusion.prediction],
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
    }


def model_index(text_encoder: TextEncoder) -> dict[str, Any]:
    """What diffusers loads each part with."""
    nothing = [None, None]
    return {
        "_class_name": "StableDiffusionPipeline",
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
