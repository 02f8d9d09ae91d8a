"""A second opinion on the density of latents: the probability-flow ODE (arXiv 2011.13456, section 4.3).

With alpha = cos(phi) and sigma = sin(phi), the marginals of x = cos(phi) x0 + sin(phi) noise are those of the flow
dx/dphi = v(x, phi), where v = cos(phi) noise - sin(phi) x0 is what a `v` model predicts (Salimans & Ho 2022, arXiv
2202.00512, appendix D), so

    log p(x at phi_0) = log N(x at phi_T; 0, I) + integral of div v from phi_0 to phi_T.

phi = atan2(sigma, alpha) stays regular where alpha is 0. Between timesteps the network gets a fractional t.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..diffusion.process import Process, add_noise
from ..errors import LatentDiffError
from ..sampling.parts import ModelParts

Velocity = Callable[[Tensor, float], Tensor]  # (x, phi) -> v, differentiable in x


class Density(NamedTuple):
    """log p of latents at the first noise level, in nats."""

    nats: Tensor  # (N,) float64
    standard_error: Tensor  # (N,), of the estimated trace; 0 for the exact one
    evaluations: int  # of the network


def angles(process: Process) -> Tensor:
    """Return phi of every timestep, (T,), ascending."""
    return torch.atan2(process.schedule.sigma, process.schedule.alpha)


def velocity(predict: Callable[[Tensor, Tensor], Tensor], process: Process) -> Velocity:
    """Return v(x, phi) for a network `predict(x, t)` with its own type of prediction and fractional timesteps."""
    known = angles(process).numpy()
    steps = np.arange(len(known), dtype=np.float64)

    def v(x: Tensor, phi: float) -> Tensor:
        t = torch.full((len(x),), float(np.interp(phi, known, steps)), dtype=torch.float64)
        output, alpha, sigma = predict(x, t), math.cos(phi), math.sin(phi)
        if process.prediction == "v":
            return output
        if process.prediction == "x0":
            return (alpha * x - output) / sigma
        if process.prediction == "eps":
            return (output - sigma * x) / alpha
        raise LatentDiffError(f"the flow of a model that predicts {process.prediction!r} is not implemented")

    return v


def log_density(
    v: Velocity, x: Tensor, start: float, end: float, *, probes: int | None = 8, tolerance: float = 1e-4, seed: int = 0
) -> Density:
    """Integrate the flow from x (N, ...) at angle `start` to `end`, where x is taken to be standard normal.

    Args:
        v: the flow.
        x: latents at `start`, float64.
        start: smallest angle.
        end: largest angle.
        probes: random signs for Hutchinson's estimate of the trace, the same along the way; None: the exact trace, for
            few dimensions.
        tolerance: relative and absolute, of scipy's RK45.
        seed: of the probes.
    """
    try:
        from scipy.integrate import solve_ivp  # type: ignore[import-untyped]
    except ImportError:
        raise LatentDiffError("integrating the flow needs scipy: pip install scipy") from None
    count, shape = len(x), x.shape
    size = x[0].numel()
    if probes is None:
        signs = torch.eye(size, dtype=x.dtype)[:, None].expand(size, count, size).reshape(size, *shape)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (probes, *shape), generator=generator).to(x.dtype) * 2 - 1
    rows = len(signs)

    def derivative(phi: float, state: Any) -> Any:
        latents = torch.from_numpy(state[: x.numel()].copy()).view(shape).requires_grad_()
        with torch.enable_grad():
            flow = v(latents, phi)
            traces = []
            for number, sign in enumerate(signs):
                (gradient,) = torch.autograd.grad((flow * sign).sum(), latents, retain_graph=number < rows - 1)
                traces.append((gradient * sign).flatten(1).sum(1))
        return np.concatenate([flow.detach().double().flatten().numpy(), torch.stack(traces).flatten().numpy()])

    first = np.concatenate([x.double().flatten().numpy(), np.zeros(rows * count)])
    found = solve_ivp(derivative, (start, end), first, method="RK45", rtol=tolerance, atol=tolerance)
    if not found.success:
        raise LatentDiffError(f"the flow could not be integrated: {found.message}")
    last = torch.from_numpy(found.y[:, -1])
    latents, traces = last[: x.numel()].view(count, -1), last[x.numel() :].view(rows, count)
    prior = -0.5 * (latents.square() + math.log(2 * math.pi)).sum(1)
    if probes is None:
        return Density(prior + traces.sum(0), torch.zeros(count, dtype=torch.float64), found.nfev)
    error = traces.std(0) / math.sqrt(rows) if rows > 1 else torch.full((count,), math.nan, dtype=torch.float64)
    return Density(prior + traces.mean(0), error, found.nfev)


def latent_density(
    pipe: ModelParts, latents: Tensor, prompts: Sequence[str], *, probes: int | None = 8, tolerance: float = 1e-3,
    seed: int = 0,
) -> Density:  # fmt: skip
    """Return log p of latents (N, c, h, w) noised to the first level, t = 0, each given its prompt, for a model.

    The same quantity is bounded by the terms of t >= 1: E[log p(x_0)] >= -L_T - sum of L_t - H[q(x_0 | z)].
    """
    weights = pipe.unet.conv_in.weight
    with torch.no_grad():
        context = pipe.text_encoder(list(prompts))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    start = torch.zeros(len(latents), dtype=torch.int64)
    x = add_noise(latents.double(), noise.double(), start, pipe.process.schedule)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return pipe.unet(x.to(weights), t.to(weights.device, torch.float32), context.to(weights)).double().cpu()

    phi = angles(pipe.process)
    return log_density(velocity(predict, pipe.process), x, float(phi[0]), float(phi[-1]), probes=probes,
                       tolerance=tolerance, seed=seed)  # fmt: skip
