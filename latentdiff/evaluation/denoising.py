"""How well a model takes noise away from pictures it has not seen, and what knowing the caption is worth.

The error is that of the denoised latents, whatever the model predicts and whatever its schedule, so that models of one
VAE compare: the mean squared error of x0 per dimension, at fixed noise levels sigma / alpha with fixed noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.process import add_noise, to_x0
from ..sampling.loop import CachedNetwork
from ..sampling.parts import ModelParts

LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # sigma / alpha
BATCH = 64


@dataclass(frozen=True)
class DenoisingError:
    """At one noise level. Latents have variance 1, so an error of 1 is that of always guessing their mean."""

    level: float  # sigma / alpha of the timestep measured, the one nearest to what was asked for
    error: float  # with the caption
    without_caption: float  # with the empty prompt


@torch.no_grad()
def denoising_errors(
    pipe: ModelParts, latents: Tensor, captions: Sequence[str], levels: Sequence[float] = LEVELS, seed: int = 0
) -> list[DenoisingError]:
    """Error of x0 at some noise levels.

    Args:
        pipe: the model.
        latents: (N, c, h, w) of pictures, from its own VAE.
        captions: one each.
        levels: sigma / alpha.
        seed: of the noise.
    """
    schedule = pipe.process.schedule
    ratios = schedule.sigma / schedule.alpha  # inf where the signal is gone
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    parts = [slice(start, start + BATCH) for start in range(0, len(latents), BATCH)]
    wanted = torch.cat([pipe.text_encoder(list(captions[part])) for part in parts])
    contexts = [wanted, pipe.text_encoder.null_context(len(latents))]
    found = []
    for level in levels:
        t = int((ratios.log() - torch.tensor(level).log()).abs().argmin())
        sums = torch.zeros(2, dtype=torch.float64)
        for part in parts:
            x0, eps = latents[part].float(), noise[part]
            times = torch.full((len(x0),), t)
            x = add_noise(x0, eps, times, schedule).to(pipe.device)
            for place, context in enumerate(contexts):
                model = CachedNetwork(pipe.network, context[part].to(pipe.unet.conv_in.weight), [t])
                guess = to_x0(model(x, t).cpu(), x.cpu(), times, pipe.process.prediction, schedule)
                sums[place] += (guess - x0).double().square().mean((1, 2, 3)).sum()
        found.append(DenoisingError(float(ratios[t]), *(sums / len(latents)).tolist()))
    return found
