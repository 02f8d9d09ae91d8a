"""Preview images during training, sampled from the same prompts and noise every time."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from text_encoder import TextEncoder
from vae import VAE

from ..data.order import random_stream
from ..data.pictures import to_images
from ..evaluation.grid import labeled_grid
from ..sampling.loop import Features, Network, sample_latents
from ..sampling.prompts import text_features
from ..sampling.settings import SamplingSettings
from .launch import Launch


@torch.no_grad()
def sample_preview(
    run: Launch,
    settings: SamplingSettings,
    prompts: Sequence[str],
    network: Network,
    text_encoder: TextEncoder,
    encode: Callable[[list[str]], Tensor],
    vae: VAE,
    latent_shape: tuple[int, ...],
    check_time: Callable[[], None],
) -> Image.Image:
    """Sample an image for each prompt, weighted or not, and return a captioned grid.

    `encode` maps prompts to features on the device. It is collective under FSDP, and so is this function; `check_time`
    is called after every step.
    """
    with run.autocast():
        cond = text_features(text_encoder, prompts, encode)
        uncond = None if settings.guidance_scale == 1 else text_features(text_encoder, [""] * len(prompts), encode)
        noise = PreviewNoise(run.config.seed, len(prompts), latent_shape, run.device)
        for step in sample_latents(network, run.config.diffusion.process(), Features(cond, uncond), settings, noise):
            x = step.x
            check_time()
        pixels = vae.decode(x).float().cpu()
    return labeled_grid(to_images(pixels), list(prompts), columns=min(8, max(1, round(len(prompts) ** 0.5))))


class PreviewNoise:
    """Standard normal noise from a seed, with one stream per image."""

    def __init__(self, seed: int, count: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.seed, self.count, self.shape, self.device = seed, count, shape, device
        self.num_draws = 0

    def draw(self) -> Tensor:
        """Return the next noise (B, c, h, w)."""
        streams = [random_stream(self.seed, "samples", self.num_draws, place) for place in range(self.count)]
        self.num_draws += 1
        arrays = [stream.standard_normal(self.shape, dtype=np.float32) for stream in streams]
        return torch.from_numpy(np.stack(arrays)).to(self.device)
