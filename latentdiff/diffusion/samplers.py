"""Samplers and the sampler loop: from noise to clean latents in few steps.

Every sampler is a list of rows (t, a, b, c, d) for the same update,

    x <- a * x + b * x0 + c * x0_prev + d * noise,        x0 = denoise(x, t),

where x0 is the model's estimate of the clean latents and x0_prev is its estimate one row earlier. A row from noise
level (alpha_t, sigma_t) to (alpha_s, sigma_s) satisfies

    a * alpha_t + b + c = alpha_s   and   (a * sigma_t)^2 + d^2 = sigma_s^2.

Rows are computed on the CPU in float64. The only first-order formula is `ddim`, of which `ddpm` is the case eta = 1;
`dpmpp_2m` and `dpmpp_2m_sde` extrapolate x0 on top of these two. `euler` is `ddim` on the grid that Euler samplers use:
Euler's method in x/alpha over sigma/alpha is DDIM (arXiv 2010.02502, equation 14), so on the same grid both give the
same image.
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
    """One step: evaluate the model at t, then set x <- a * x + b * x0 + c * x0_prev + d * noise."""

    t: int
    a: float
    b: float
    c: float
    d: float


class Coefficients(NamedTuple):
    """The four columns of all rows, float64, (n,) each."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor


class Step(NamedTuple):
    """What the loop yields after each row."""

    t: int  # timestep of the row
    x: Tensor  # latents after the row
    x0: Tensor  # the model's estimate of the clean latents, from which x was computed


# --- coefficients: alpha and sigma are (n + 1,), from the noisiest level to the one where sampling ends ---


def ddim(alpha: Tensor, sigma: Tensor, eta: float = 0.0) -> Coefficients:
    """Return the coefficients of DDIM (arXiv 2010.02502, eqs. 12 and 16): eta = 0 is deterministic, 1 is ancestral."""
    d = eta * sigma[1:] / sigma[:-1] * (1 - (alpha[:-1] / alpha[1:]).square()).sqrt()
    a = (sigma[1:].square() - d.square()).sqrt() / sigma[:-1]
    return Coefficients(a, alpha[1:] - a * alpha[:-1], torch.zeros_like(a), d)


def ddpm(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """Return the coefficients of ancestral sampling with the posterior variance (arXiv 2006.11239, algorithm 2)."""
    return ddim(alpha, sigma, eta=1.0)


def euler(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """Return the coefficients of Euler's method for the probability-flow ODE, which are those of `ddim`."""
    return ddim(alpha, sigma)


def dpmpp_2m(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """Return the coefficients of DPM-Solver++(2M), second-order and deterministic (arXiv 2211.01095, algorithm 2)."""
    return _extrapolate_x0(ddim(alpha, sigma), alpha, sigma)


def dpmpp_2m_sde(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """Return the coefficients of SDE-DPM-Solver++(2M), `dpmpp_2m` on top of `ddpm` (arXiv 2211.01095, appendix D)."""
    return _extrapolate_x0(ddpm(alpha, sigma), alpha, sigma)


def _extrapolate_x0(first: Coefficients, alpha: Tensor, sigma: Tensor) -> Coefficients:
    """Replace x0 by x0 + (x0 - x0_prev) * h / (2 h_prev), where h is the step in log(alpha / sigma).

    The first row has no x0_prev, and a step to sigma = 0 is infinitely long: neither extrapolates. A step from
    alpha = 0 is infinitely long too; there alpha is replaced by 2**-12, as in diffusers, or by half the next alpha if
    that is smaller.
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
    """Return `num_steps` distinct timesteps from 0 ... T-1 in descending order (arXiv 2305.08891, table 2).

    `trailing` spacing starts at T-1, where x is pure noise under zero terminal SNR; `leading` starts below T-1 and ends
    at `offset` (1 in Stable Diffusion); `linspace` includes both ends (only T-1 for a single step).
    Raises LatentDiffError on an unknown spacing, or a number of steps or offset out of range.
    """
    check_choice("spacing", spacing, SPACINGS)
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= num_timesteps:
        raise LatentDiffError(f"num_steps={num_steps!r}: expected an integer from 1 to {num_timesteps}")
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
        raise LatentDiffError(f"offset={offset!r} moves timesteps out of the range 0 to {num_timesteps - 1}")
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
    """Return the rows that take x from the noisiest timestep of a grid to clean latents.

    Args:
        sampler: `ddpm`, `ddim`, `euler`, `dpmpp_2m` or `dpmpp_2m_sde`.
        schedule: the noise schedule, with T timesteps.
        num_steps: number of rows, 1 to T.
        spacing: `trailing`, `leading` or `linspace`, see `timesteps`; None: `linspace` for `euler`, else `trailing`.
        offset: added to the timesteps of `leading` spacing.
        final_sigma_zero: False ends at the noise level of t = 0, as the original Stable Diffusion does (diffusers'
            `set_alpha_to_one: false`).
        eta: `ddim` only: 0 (the default) is deterministic, 1 is `ddpm`.

    Raises:
        LatentDiffError: on an unknown sampler or spacing, or a number out of range.
    """
    if spacing is None:
        spacing = "linspace" if sampler == "euler" else "trailing"
    grid = timesteps(schedule.num_timesteps, num_steps, spacing, offset)
    return rows_at(sampler, schedule, grid, final_sigma_zero=final_sigma_zero, eta=eta)


def rows_at(
    sampler: str, schedule: Schedule, grid: Sequence[int], *, final_sigma_zero: bool = True, eta: float | None = None
) -> list[Row]:
    """Return the rows from each timestep of a descending grid to the next, and from the last to clean latents.

    To start from a noised image, pass the later part of `timesteps` as the grid. The other arguments are those of
    `make_rows`. Raises LatentDiffError on an unknown sampler, an eta out of range, or a grid that is not descending
    within 0 ... T-1.
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
            f"timesteps {list(grid)}: expected descending integers from 0 to {schedule.num_timesteps - 1}"
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
    """Run rows from x and yield after each one; the last step's `x` is the result, in float32 or float64.

    Args:
        denoise: (x, t) -> x0; handles the prediction type, guidance and the model's dtype.
        x: latents at the first row's noise level: standard normal noise, unless sampling starts from an image.
        rows: from `make_rows` or `rows_at`.
        noise: row index -> standard normal noise, called for rows that add noise; default: torch's global generator.
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
