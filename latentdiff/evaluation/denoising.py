"""How well a model denoises held-out pictures, and how much the caption helps.

The error is the mean squared error of the predicted x0 per dimension, at fixed noise levels sigma / alpha and with
fixed noise. It depends neither on the prediction type nor on the schedule, so models with the same VAE are comparable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.process import add_noise
from ..sampling.loop import CachedNetwork
from ..sampling.parts import ModelParts

LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # sigma / alpha
BATCH = 64


@dataclass(frozen=True)
class DenoisingError:
    """Error at one noise level; latents have variance 1, so always predicting their mean gives an error of 1."""

    level: float  # sigma / alpha at the timestep nearest to the requested level
    error: float  # with the caption
    without_caption: float  # with the empty prompt


@torch.no_grad()
def denoising_errors(
    pipe: ModelParts, latents: Tensor, captions: Sequence[str], levels: Sequence[float] = LEVELS, seed: int = 0
) -> list[DenoisingError]:
    """Measure the error of the predicted x0 at some noise levels sigma / alpha, with noise from `seed`.

    `latents` (N, c, h, w) come from the model's own VAE; `captions` has one for each.
    """
    schedule = pipe.process.schedule
    ratios = schedule.sigma / schedule.alpha  # inf where no signal is left
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    parts = [slice(start, start + BATCH) for start in range(0, len(latents), BATCH)]
    conditional = torch.cat([pipe.text_encoder(list(captions[part])) for part in parts])
    contexts = [conditional, pipe.text_encoder.null_context(len(latents))]
    errors = []
    for level in levels:
        t = int((ratios.log() - torch.tensor(level).log()).abs().argmin())
        sums = torch.zeros(2, dtype=torch.float64)
        for part in parts:
            x0, eps = latents[part].float(), noise[part]
            times = torch.full((len(x0),), t)
            x = add_noise(x0, eps, times, schedule).to(pipe.device)
            for i, context in enumerate(contexts):
                model = CachedNetwork(pipe.network, context[part].to(pipe.unet.conv_in.weight), [t])
                predicted = pipe.process.x0(model(x, t).cpu(), x.cpu(), times)
                sums[i] += (predicted - x0).double().square().mean((1, 2, 3)).sum()
        errors.append(DenoisingError(float(ratios[t]), *(sums / len(latents)).tolist()))
    return errors
