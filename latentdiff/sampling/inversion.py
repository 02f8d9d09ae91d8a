"""The sampling loop in reverse: find the noise from which `ddim` samples given latents."""

import torch
from torch import Tensor

from ..diffusion.process import Process
from ..diffusion.samplers import rows_at
from .loop import Features, Network, denoise, guided_model, timestep_grid
from .settings import SamplingSettings

ITERATIONS = 3  # of the fixed-point solver, per step


@torch.no_grad()
def invert_latents(
    network: Network, process: Process, features: Features, settings: SamplingSettings, latents: Tensor
) -> Tensor:
    """Run `ddim` backwards from latents (B, c, h, w) to the noise they are sampled from (arXiv 2105.05233, app. F).

    Each step is solved for its starting point by fixed-point iteration, so that sampling forward undoes it.
    """
    grid = timestep_grid(process, settings)
    model = guided_model(network, process, features, settings, grid)
    rows = rows_at("ddim", process.schedule, grid, final_sigma_zero=process.final_sigma_zero)
    alpha, sigma = process.schedule.alpha.tolist(), process.schedule.sigma.tolist()
    x, below = latents, (1.0, 0.0) if process.final_sigma_zero else (alpha[0], sigma[0])
    for t, a, b, _, _ in reversed(rows):
        end, x = x, x  # solve end = a x + b x0(x) for x
        for _ in range(ITERATIONS):
            x0 = denoise(model, process, None, x, t)
            if a > 0.5 or below[0] <= below[1]:
                x = (end - b * x0) / a
            else:  # iterate on the noise, which hardly changes where x0 dominates the step
                noise = (x - alpha[t] * x0) / sigma[t]
                x = (alpha[t] * end + (sigma[t] * below[0] - alpha[t] * below[1]) * noise) / below[0]
        below = (alpha[t], sigma[t])
    return x
