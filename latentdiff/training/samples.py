"""Pictures drawn during training: the same prompts, the same noise, every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from text_encoder import TextEncoder
from vae import VAE

from ..data.order import draws
from ..diffusion.guidance import guide
from ..diffusion.process import to_x0
from ..diffusion.samplers import make_rows, sample
from ..diffusion.schedule import Schedule
from ..evaluation.grid import labelled_grid, to_images
from .launch import Launch


@torch.no_grad()
def draw_prompts(
    run: Launch,
    prompts: Sequence[str],
    model: nn.Module,
    text_encoder: TextEncoder,
    vae: VAE,
    schedule: Schedule,
    latent_shape: tuple[int, ...],
) -> Image.Image:
    """A labelled grid, one picture a prompt.

    Under FSDP all processes must call it, and the text encoder, where it is trained, runs inside every call of `model`:
    a `LatentModel`, of which only the whole can be called.
    """
    settings, diffusion, device = run.config.validation, run.config.diffusion, run.device
    tokens, mask, _ = text_encoder.tokenize([*prompts, *[""] * len(prompts)])
    tokens, mask = tokens.to(device), mask.to(device)
    with run.autocast():
        context = None if run.config.text_encoder.train else text_encoder.encode(tokens, mask).float()

        def predict(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            times = torch.full((2 * len(x),), t, device=device)
            conditional, unconditional = model(torch.cat([x, x]), times, context, tokens, mask).float().chunk(2)
            return conditional, unconditional

        guided = guide(predict, settings.guidance_scale)

        def denoise(x: Tensor, t: int) -> Tensor:
            return to_x0(guided(x, t), x, torch.tensor(t), diffusion.prediction, schedule)

        def fresh(number: int) -> Tensor:
            return _noise(run.config.seed, number + 1, len(prompts), latent_shape).to(device)

        x = _noise(run.config.seed, 0, len(prompts), latent_shape).to(device)
        for step in sample(denoise, x, make_rows(settings.sampler, schedule, num_steps=settings.num_steps), fresh):
            x = step.x
        pixels = vae.decode(x).float().cpu()
    return labelled_grid(to_images(pixels), list(prompts), columns=min(8, max(1, round(len(prompts) ** 0.5))))


def _noise(seed: int, number: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal, one stream a picture, for the start (0) or a step of a sampler that adds noise."""
    pictures = [
        draws(seed, "samples", number, place).standard_normal(shape, dtype=np.float32) for place in range(count)
    ]
    return torch.from_numpy(np.stack(pictures))
