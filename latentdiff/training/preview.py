"""Pictures sampled during a training: the same prompts, the same noise, every time."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from text_encoder import TextEncoder
from vae import VAE

from ..data.order import draws
from ..data.pictures import to_images
from ..evaluation.grid import labelled_grid
from ..sampling.loop import Features, Network, last, sample_latents
from ..sampling.prompts import text_features
from .launch import Launch


@torch.no_grad()
def sample_preview(
    run: Launch,
    prompts: Sequence[str],
    network: Network,
    text_encoder: TextEncoder,
    encode: Callable[[list[str]], Tensor],
    vae: VAE,
    latent_shape: tuple[int, ...],
) -> Image.Image:
    """A labelled grid, one picture a prompt.

    Args:
        run: its settings of validation say how to sample.
        prompts: with weights, where they have any.
        network: the UNet.
        text_encoder: counts the tokens.
        encode: prompts to features, on the device; under FSDP all processes call it together, and so this function.
        vae: decodes.
        latent_shape: (c, h, w).
    """
    settings = run.config.validation.sampling()
    with run.autocast():
        wanted = text_features(text_encoder, prompts, encode)
        unwanted = None if settings.guidance_scale == 1 else text_features(text_encoder, [""] * len(prompts), encode)
        noise = PreviewNoise(run.config.seed, len(prompts), latent_shape, run.device)
        steps = sample_latents(network, run.config.diffusion.process(), Features(wanted, unwanted), settings, noise)
        pixels = vae.decode(last(steps).x).float().cpu()
    return labelled_grid(to_images(pixels), list(prompts), columns=min(8, max(1, round(len(prompts) ** 0.5))))


class PreviewNoise:
    """Standard normal noise of a seed, one stream a picture."""

    def __init__(self, seed: int, count: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.seed, self.count, self.shape, self.device = seed, count, shape, device
        self.drawn = 0

    def draw(self) -> Tensor:
        """The next noise, (B, c, h, w)."""
        streams = [draws(self.seed, "samples", self.drawn, place) for place in range(self.count)]
        self.drawn += 1
        arrays = [stream.standard_normal(self.shape, dtype=np.float32) for stream in streams]
        return torch.from_numpy(np.stack(arrays)).to(self.device)
