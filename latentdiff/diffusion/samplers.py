"""Samplers and the sampler loop: from noise to clean latents, in as few steps as possible.

Every sampler here is a list of rows (t, a, b, c, d) for one loop,

    x <- a * x + b * x0 + c * x0_prev + d * noise,        x0 = denoise(x, t),

where x0 is what the model takes the clean latents to be and x0_prev what it took them for one row earlier. A row that
goes from noise level (alpha_t, sigma_t) to (alpha_s, sigma_s) keeps both levels exactly:

    a * alpha_t + b + c = alpha_s   and   (a * sigma_t)^2 + d^2 = sigma_s^2.

Rows are computed on the CPU in float64. `ddim`, and `ddpm` which is `ddim` with eta = 1, are the only first-order
formulas; `dpmpp_2m` and `dpmpp_2m_sde` extrapolate x0 on top of them. `euler` is `ddim` on the grid that Euler
samplers use: Euler's method in x/alpha over sigma/alpha is DDIM (arXiv 2010.02502, equation 14), so on one grid the two
draw the same picture.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import LatentDiffError, check_choice
from .schedule import Schedule, at_least_float32

Spacing = Literal["leading", "trailing", "linspace"]
SPACINGS: tuple[Spacing, ...] = ("leading", "trailing", "linspace")

Denoise = Callable[[Tensor, int], Tensor]  # (x, t) -> x0


class Row(NamedTuple):
    """One step: evaluate the model at t, then x <- a x + b x0 + c x0_prev + d noise."""

    t: int
    a: float
    b: float
    c: float
    d: float


class Coefficients(NamedTuple):
    """The four columns of all rows, (n,) float64 each."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor


class Step(NamedTuple):
    """What the loop yields after a row: its t, the new x and the x0 that led to it."""

    t: int
    x: Tensor
    x0: Tensor


# --- coefficient rows: alpha and sigma are (n + 1,), from the noisiest level to the one where sampling ends ---


def ddim(alpha: Tensor, sigma: Tensor, eta: float = 0.0) -> Coefficients:
    """DDIM, deterministic at eta = 0 and ancestral sampling at eta = 1 (arXiv 2010.02502, equations 12 and 16)."""
    d = eta * sigma[1:] / sigma[:-1] * (1 - (alpha[:-1] / alpha[1:]).square()).sqrt()
    a = (sigma[1:].square() - d.square()).sqrt() / sigma[:-1]
    return Coefficients(a, alpha[1:] - a * alpha[:-1], torch.zeros_like(a), d)


def ddpm(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """Ancestral sampling with the posterior's variance (arXiv 2006.11239, algorithm 2)."""
    return ddim(alpha, sigma, eta=1.0)


def euler(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """Euler's method for the probability-flow ODE: the same rows as `ddim`."""
    return ddim(alpha, sigma)


def dpmpp_2m(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """DPM-Solver++(2M), second order, deterministic (arXiv 2211.01095, algorithm 2)."""
    return _extrapolate_x0(ddim(alpha, sigma), alpha, sigma)


def dpmpp_2m_sde(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """SDE-DPM-Solver++(2M): `dpmpp_2m` on ancestral sampling (arXiv 2211.01095, appendix D)."""
    return _extrapolate_x0(ddpm(alpha, sigma), alpha, sigma)


def _extrapolate_x0(first: Coefficients, alpha: Tensor, sigma: Tensor) -> Coefficients:
    """Replace x0 by x0 + (x0 - x0_prev) * h / (2 h_prev), h the step in log(alpha / sigma).

    The first row has no x0_prev, and towards a level without noise the step is infinitely long: neither extrapolates.
    From a level without signal it is infinitely long too; there alpha counts as 2**-12, diffusers' stand-in, or less
    where the next level has hardly more.
    """
    if alpha[0] == 0:
        alpha = torch.cat([(alpha[1:2] / 2).clamp(max=2.0**-12), alpha[1:]])
    step = (alpha / sigma).log().diff()
    slope = torch.zeros_like(step)
    slope[1:] = 0.5 * step[1:] / step[:-1]
    slope[step.isinf()] = 0.0
    return Coefficients(first.a, first.b * (1 + slope), -first.b * slope, first.d)


SAMPLERS: dict[str, Callable[..., Coefficients]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}


# --- grids ---


def timesteps(num_timesteps: int, num_steps: int, spacing: Spacing = "trailing", offset: int = 0) -> list[int]:
    """`num_steps` distinct timesteps of 0 ... T-1, descending (arXiv 2305.08891, table 2).

    Args:
        num_timesteps: T.
        num_steps: 1 to T.
        spacing: `trailing` starts at T-1, where x is pure noise under zero terminal SNR; `leading` ends at `offset`
            and starts below T-1; `linspace` has both ends (one step: T-1 alone).
        offset: added to `leading` (Stable Diffusion's `steps_offset` is 1).

    Raises:
        LatentDiffError: unknown spacing, or a number of steps or an offset that does not fit.
    """
    check_choice("spacing", spacing, SPACINGS)
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= num_timesteps:
        raise LatentDiffError(f"num_steps={num_steps!r}: expected a whole number from 1 to {num_timesteps}")
    if offset and spacing != "leading":
        raise LatentDiffError(f"offset={offset!r} with spacing {spacing!r}: only 'leading' takes an offset")
    index = torch.arange(num_steps, dtype=torch.float64)
    if spacing == "leading":
        grid = (num_timesteps // num_steps) * index.flip(0) + offset
    elif spacing == "trailing":
        grid = (num_timesteps - index * (num_timesteps / num_steps)).round() - 1
    else:
        grid = (num_timesteps - 1) * (1 - index / max(num_steps - 1, 1))
    result = [int(t) for t in grid.round()]
    if not 0 <= result[-1] <= result[0] < num_timesteps:
        raise LatentDiffError(f"offset={offset!r} leaves the timesteps 0 to {num_timesteps - 1}")
    return result


def make_rows(
    sampler: str,
    schedule: Schedule,
    num_steps: int,
    *,
    spacing: Spacing | None = None,
    offset: int = 0,
    final_sigma_zero: bool = True,
    eta: float | None = None,
) -> list[Row]:
    """The rows that take x from the first timestep of a grid to clean latents.

    Args:
        sampler: `ddpm`, `ddim`, `euler`, `dpmpp_2m` or `dpmpp_2m_sde`.
        schedule: the forward process.
        num_steps: rows, 1 to T.
        spacing: of the grid; None for `linspace` with `euler` and `trailing` with the others.
        offset: of `leading` spacing.
        final_sigma_zero: as in `rows_at`.
        eta: `ddim` only: 0, the default, is deterministic and 1 is `ddpm`.

    Raises:
        LatentDiffError: unknown sampler or spacing, or a number out of range.
    """
    if spacing is None:
        spacing = "linspace" if sampler == "euler" else "trailing"
    grid = timesteps(schedule.num_timesteps, num_steps, spacing, offset)
    return rows_at(sampler, schedule, grid, final_sigma_zero=final_sigma_zero, eta=eta)


def rows_at(
    sampler: str, schedule: Schedule, grid: Sequence[int], *, final_sigma_zero: bool = True, eta: float | None = None
) -> list[Row]:
    """The rows from each timestep of a grid to the next, and from the last to clean latents.

    Args:
        sampler: as in `make_rows`.
        schedule: the forward process.
        grid: descending timesteps, for instance the later part of `timesteps` to start from a noised picture.
        final_sigma_zero: False ends at the noise level of t = 0 instead, as the original Stable Diffusion does
            (diffusers' `set_alpha_to_one: false`).
        eta: as in `make_rows`.

    Raises:
        LatentDiffError: unknown sampler, eta out of range, or a grid that does not descend within 0 ... T-1.
    """
    check_choice("sampler", sampler, SAMPLERS)
    if eta is not None and (sampler != "ddim" or not 0 <= eta <= 1):
        raise LatentDiffError(f"eta={eta!r} with sampler {sampler!r}: only 'ddim' takes an eta, from 0 to 1")
    if (
        not grid
        or not all(isinstance(t, int) for t in grid)
        or grid[0] >= schedule.num_timesteps
        or grid[-1] < 0
        or any(a <= b for a, b in pairwise(grid))
    ):
        raise LatentDiffError(
            f"timesteps {list(grid)}: expected them descending within 0 to {schedule.num_timesteps - 1}"
        )
    index = torch.tensor(grid)
    end = (1.0, 0.0) if final_sigma_zero else (float(schedule.alpha[0]), float(schedule.sigma[0]))
    alpha = torch.cat([schedule.alpha.cpu()[index], torch.tensor(end[:1], dtype=torch.float64)])
    sigma = torch.cat([schedule.sigma.cpu()[index], torch.tensor(end[1:], dtype=torch.float64)])
    columns = SAMPLERS[sampler](alpha, sigma, **({} if eta is None else {"eta": eta}))
    return [Row(t, *values) for t, *values in zip(grid, *(column.tolist() for column in columns), strict=True)]


# --- the loop ---


def sample(
    denoise: Denoise, x: Tensor, rows: Iterable[Row], noise: Callable[[int], Tensor] | None = None
) -> Iterator[Step]:
    """Run rows from x, yielding after each; the last `x` is the result. Nothing here is below float32.

    Args:
        denoise: (x, t) -> x0, a model with its prediction, guidance and dtype dealt with; x comes in float32.
        x: at the first row's noise level; standard normal where sampling starts from nothing.
        rows: from `make_rows`.
        noise: standard normal noise for the i-th row that wants some; by default drawn from torch's global generator.
    """
    x = x0_prev = at_least_float32(x)
    for index, (t, a, b, c, d) in enumerate(rows):
        x0 = at_least_float32(denoise(x, t))
        x = a * x + b * x0
        if c:
            x = x + c * x0_prev
        if d:
            x = x + d * (torch.randn_like(x) if noise is None else noise(index))
        x0_prev = x0
        yield Step(t, x, x0)
