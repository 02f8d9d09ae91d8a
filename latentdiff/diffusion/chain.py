"""The forward chain beyond x_t: noisier states, as a sampler that arrives at x_t would have passed through.

    x_s = (alpha_s / alpha_t) x_t + sqrt(sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2) xi,   s > t,   xi ~ N(0, I)

(DDPM, arXiv 2006.11239, equation 2 over several steps). Every state gets noise of its own, from the state before it, so
that x0, x_t, x_s ... are a Markov chain: given x_t, the others say nothing more about x0. With the noise of x_t they
would: two states that share one noise determine x0, and two with independent noises are two views of it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .schedule import Schedule

GRID_SIZES = (10, 50)  # fewest and most steps of the sampling grids whose gaps a chain has


def noisier_timesteps(t: int, num_steps: int, count: int, num_timesteps: int) -> list[int]:
    """Return the `count` timesteps before t on a grid of `num_steps` steps, the nearest first.

    There are none beyond T-1: a chain that ends there repeats its last timestep.
    """
    times = [t]
    for number in range(1, count + 1):
        earlier = t + round(number * num_timesteps / num_steps)
        times.append(earlier if earlier < num_timesteps else times[-1])
    return times[1:]


def forward_chain(x_t: Tensor, t: Tensor, times: Tensor, noise: Tensor, schedule: Schedule) -> Iterator[Tensor]:
    """Yield the states at the timesteps of each column of `times`, the nearest first, in the dtype of x_t.

    Under zero terminal SNR the state at T-1 is its noise alone. Where a timestep is repeated, so is the state.

    Args:
        x_t: where the chain begins, (B, ...).
        t: its timesteps (B,).
        times: later timesteps (B, K), none smaller than the one before it.
        noise: standard normal noise of each state, (B, K, ...).
        schedule: the noise schedule.
    """
    for s, xi in zip(times.unbind(1), noise.unbind(1), strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t, x_t), schedule.at(s, x_t)
        stays = (s == t).view(alpha_t.shape)  # not 0 / 0, either
        ratio = torch.where(stays, 1.0, alpha_s / alpha_t)
        deviation = (sigma_s.square() - (ratio * sigma_t).square()).clamp(min=0).sqrt()
        x_t, t = (ratio * x_t + torch.where(stays, 0.0, deviation) * xi).to(x_t.dtype), s
        yield x_t
