"""The noise schedule: signal and noise levels at every timestep t.

    x_t = alpha_t * x0 + sigma_t * noise,   alpha_t = sqrt(alpha_bar_t),   sigma_t = sqrt(1 - alpha_bar_t),
    alpha_bar_t = product over s <= t of (1 - beta_s)                        (DDPM, arXiv 2006.11239, equation 4)

Some texts write z_t for x_t, x or z_0 for x0, and beta-tilde_t for alpha_bar_t. The paper numbers timesteps 1 ... T;
t here is one less, 0 ... T-1, and the paper's alpha_bar_0 = 1 corresponds to clean latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LatentDiffError, check_choice


def linear(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Return linearly spaced betas; the defaults are DDPM's for T = 1000 (arXiv 2006.11239, section 4)."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def scaled_linear(num_timesteps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Return betas with linearly spaced square roots; the defaults are those of LDM and Stable Diffusion."""
    return torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps, dtype=torch.float64).square()


def cosine(num_timesteps: int) -> Tensor:
    """Return betas for a squared-cosine alpha_bar, clipped at 0.999 (arXiv 2102.09672, equation 17)."""
    angle = (torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps + 0.008) / 1.008 * (math.pi / 2)
    alpha_bar = angle.cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


BETAS: dict[str, Callable[..., Tensor]] = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine}


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Return betas with alpha shifted and scaled to end at exactly 0, alpha[0] unchanged (arXiv 2305.08891, alg. 1)."""
    alpha = (1 - betas).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    alpha_bar = alpha.square()
    ratios = alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return 1 - ratios


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def can_read_values(x: Tensor) -> bool:
    """Return whether values of x can be read cheaply: without synchronizing a GPU or breaking a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class ScheduleName(NamedTuple):
    """The arguments of `Schedule.named` with defaults filled in, which config files store instead of the betas."""

    name: str
    beta_start: float
    beta_end: float
    zero_terminal_snr: bool


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule with T timesteps: tables of length T, in float64, on one device."""

    betas: Tensor  # variance added by step t, at least 2 values in (0, 1); only the last may be 1
    alpha_bar: Tensor = field(init=False)  # fraction of the signal's variance left at t
    alpha: Tensor = field(init=False)  # scale of x0 in x_t
    sigma: Tensor = field(init=False)  # standard deviation of the noise in x_t
    alpha_prev: Tensor = field(init=False)  # alpha at t - 1; 1 at t = 0
    sigma_prev: Tensor = field(init=False)  # sigma at t - 1; 0 at t = 0
    has_zero_terminal_snr: bool = field(init=False)  # whether x_T is pure noise
    name: ScheduleName | None = field(init=False, default=None)  # set by `Schedule.named`

    def __post_init__(self) -> None:
        if not isinstance(self.betas, Tensor):
            raise LatentDiffError(f"betas are a {type(self.betas).__name__}; expected a tensor")
        betas = self.betas.double()
        if betas.dim() != 1 or len(betas) < 2:
            raise LatentDiffError(f"betas have shape {tuple(betas.shape)}; expected a 1-D tensor of at least 2 values")
        if not bool(((betas > 0) & (betas <= 1)).all()) or bool((betas[:-1] == 1).any()):
            raise LatentDiffError("betas must lie in (0, 1); only the last may be 1")
        # Compute sigma from log(1 - beta): 1 - cumprod would lose precision at the first, tiny noise levels.
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        alpha, sigma = (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
        self._set(
            betas=betas,
            alpha_bar=log_alpha_bar.exp(),
            alpha=alpha,
            sigma=sigma,
            alpha_prev=torch.cat([alpha.new_ones(1), alpha[:-1]]),
            sigma_prev=torch.cat([sigma.new_zeros(1), sigma[:-1]]),
            has_zero_terminal_snr=bool(alpha[-1] == 0),  # read once: reading it synchronizes a GPU
        )

    @classmethod
    def named(
        cls,
        name: str = "scaled_linear",
        num_timesteps: int = 1000,
        *,
        beta_start: float | None = None,
        beta_end: float | None = None,
        zero_terminal_snr: bool = False,
    ) -> Schedule:
        """Create a schedule by name.

        Args:
            name: `linear`, `scaled_linear` or `cosine`.
            num_timesteps: T.
            beta_start: first beta; None for the default of `name`. Not for `cosine`.
            beta_end: last beta, likewise.
            zero_terminal_snr: rescale so that x_T is pure noise, which is what sampling starts from.

        Raises:
            LatentDiffError: on an unknown name or a number out of range.
        """
        check_choice("schedule", name, BETAS)
        if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int) or num_timesteps < 2:
            raise LatentDiffError(f"num_timesteps={num_timesteps!r}: expected an integer of at least 2")
        asked = {"beta_start": beta_start, "beta_end": beta_end}
        given = {key: value for key, value in asked.items() if value is not None}
        if name == "cosine" and given:
            raise LatentDiffError(f"{next(iter(given))} is not a setting of the cosine schedule")
        for key, value in given.items():
            if not isinstance(value, int | float) or not 0 < value < 1:
                raise LatentDiffError(f"{key}={value!r}: expected a number between 0 and 1")
        betas = BETAS[name](num_timesteps, **given)
        schedule = cls(rescale_to_zero_terminal_snr(betas) if zero_terminal_snr else betas)
        ends = {key: given.get(key, float(betas[index])) for key, index in (("beta_start", 0), ("beta_end", -1))}
        schedule._set(name=ScheduleName(name, **ends, zero_terminal_snr=zero_terminal_snr))
        return schedule

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self.betas)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, (T,)."""
        return self.alpha_bar / self.sigma.square()

    @property
    def log_snr(self) -> Tensor:
        """Logarithm of `snr`, (T,); -inf where no signal is left."""
        return self.snr.log()

    def to(self, device: torch.device | str) -> Schedule:
        """Return the schedule with its tables on another device, in float32 on MPS, which has no float64."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        moved = copy(self)
        tables = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved._set(**{name: table.to(device, dtype) for name, table in tables.items()})
        return moved

    def check(self, t: Tensor) -> None:
        """Raise LatentDiffError unless t is int64 within 0 ... T-1.

        Values are checked on the CPU only, where reading them does not synchronize, and not while compiling. On a GPU,
        an index out of range ends in a CUDA assertion.
        """
        if t.dtype != torch.int64:
            raise LatentDiffError(f"t is {t.dtype}; expected int64")
        if can_read_values(t) and t.numel() and (t.min() < 0 or t.max() >= self.num_timesteps):
            raise LatentDiffError(f"t={t.tolist()} is out of range; the timesteps are 0 to {self.num_timesteps - 1}")

    def gather(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Look up entries t, (B,) or (), of a table (T,), shaped to broadcast against `like` (B, ...).

        t must be on the table's device, the CPU unless the schedule was moved. The result is on the device of `like`,
        in float64 if `like` is, else in float32. Raises LatentDiffError on a wrong dtype, shape, value or device of t.
        """
        self.check(t)
        if t.dim() > 1 or (t.dim() == 1 and t.shape[0] not in (1, like.shape[0])):
            raise LatentDiffError(f"t has shape {tuple(t.shape)}; expected () or ({like.shape[0]},)")
        if t.device != table.device:
            raise LatentDiffError(
                f"t is on {t.device}, but the schedule is on {table.device}: move it with schedule.to(...)"
            )
        values = table.index_select(0, t.reshape(-1))  # unlike table[t], rejects negative indices
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        values = values.to(dtype).view(-1, *[1] * (like.dim() - 1))
        if like.device.type == "cuda" and values.device.type == "cpu":
            values = values.pin_memory()  # otherwise the host would wait for the device
        return values.to(like.device, non_blocking=True)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at t, shaped to broadcast against `like` (B, ...)."""
        return self.gather(self.alpha, t, like), self.gather(self.sigma, t, like)

    def _set(self, **values: Tensor | bool | ScheduleName) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
