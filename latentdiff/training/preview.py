"""Samples during training, from the same prompts and noise every time, and pictures of them."""

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
def sample_prompts(
    run: Launch,
    settings: SamplingSettings,
    prompts: Sequence[str],
    network: Network,
    text_encoder: TextEncoder,
    encode: Callable[[list[str]], Tensor],
    latent_shape: tuple[int, ...],
    check_time: Callable[[], None],
    first: int = 0,
) -> Tensor:
    """Sample latents (B, c, h, w) for prompts, weighted or not; `first` is the place of the first in its series.

    `encode` maps prompts to features on the device. It is collective under FSDP, and so is this function; `check_time`
    is called after every step.
    """
    with run.autocast():
        cond = text_features(text_encoder, prompts, encode)
        uncond = None if settings.guidance_scale == 1 else text_features(text_encoder, [""] * len(prompts), encode)
        noise = PreviewNoise(run.config.seed, range(first, first + len(prompts)), latent_shape, run.device)
        for step in sample_latents(network, run.config.diffusion.process(), Features(cond, uncond), settings, noise):
            x = step.x
            check_time()
    return x


@torch.no_grad()
def decoded_grid(run: Launch, vae: VAE, latents: Tensor, prompts: Sequence[str]) -> Image.Image:
    """Decode latents (B, c, h, w) and return a captioned grid."""
    with run.autocast():
        pixels = vae.decode(latents).float().cpu()
    return labeled_grid(to_images(pixels), list(prompts), columns=min(8, max(1, round(len(prompts) ** 0.5))))


class PreviewNoise:
    """Standard normal noise from a seed, with one stream per image."""

    def __init__(self, seed: int, places: range, shape: tuple[int, ...], device: torch.device) -> None:
        self.seed, self.places, self.shape, self.device = seed, places, shape, device
        self.num_draws = 0

    def draw(self) -> Tensor:
        """Return the next noise (B, c, h, w)."""
        streams = [random_stream(self.seed, "samples", self.num_draws, place) for place in self.places]
        self.num_draws += 1
        arrays = [stream.standard_normal(self.shape, dtype=np.float32) for stream in streams]
        return torch.from_numpy(np.stack(arrays)).to(self.device)
