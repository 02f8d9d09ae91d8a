"""How probable is a picture? A bound on the model's own log-probability of its 8-bit values, in nats.

The model draws latents z by its reverse chain, which starts from a standard normal x_{T-1}, and then each value of the
picture from a Laplace (or normal) distribution around the decoded z, rounded to one of 256 levels. For any posterior
q(z | x), here the VAE's encoder, possibly widened by `posterior_floor`,

    log p(x) >= E_q[log p(x | z)] + H[q(z | x)] - L_T - sum over t >= 1 of L_t - L_0

with the terms of DDPM (arXiv 2006.11239, equation 5, `diffusion/bound.py`) in z. This is a property of the model, with
the reverse variance that is asked for: it bounds the probability that this very model gives to the picture. That the
bound is lower than the data's own log-density holds on average over the data only, not for each picture.

Each draw takes z and the noise anew, all terms of t = 0, and a few timesteps t >= 1, stratified, in proportion to how
much they vary, a quarter of the probability evenly (`Proposal`), weighted so that nothing is biased. Draws are
independent, so their spread gives the standard error, posterior and timesteps counted in.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vae import DiagonalGaussian

from ..device import without_tf32
from ..diffusion.bound import bound_term, prior_term
from ..diffusion.process import Process, Variance, add_noise
from ..errors import LatentDiffError, check_choice
from ..sampling.parts import ModelParts
from .proposal import Proposal, Proposals, grid, stratified

Likelihood = Literal["laplace", "normal"]
HALF_LEVEL = 1 / 255  # half the distance of two levels in [-1, 1]
STUDENT_90 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)  # 95 % quantiles for 1 to 9 degrees
NORMAL_90 = 1.645


@dataclass(frozen=True)
class Bound:
    """A lower bound on log p(picture | prompt), estimated from several draws; the parts add up to `nats`."""

    decoder: float  # E log p(x | z); nan where it was not asked for or its spread is unknown, and left out of the sum
    entropy: float  # H[q(z | x)]
    prior: float  # -L_T
    kl: float  # minus the sum of L_t, t >= 1
    first: float  # -L_0
    by_draw: tuple[float, ...]  # nats of each draw
    dimensions: int  # values of the picture
    png: float  # nats that a PNG of the picture takes

    @property
    def nats(self) -> float:
        """The estimate."""
        return float(np.mean(self.by_draw))

    @property
    def standard_error(self) -> float:
        """Standard error of `nats`; nan for a single draw."""
        count = len(self.by_draw)
        return float(np.std(self.by_draw, ddof=1) / math.sqrt(count)) if count > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Student's 90 % interval of `nats`."""
        degrees = len(self.by_draw) - 1
        factor = STUDENT_90[degrees - 1] if 1 <= degrees <= len(STUDENT_90) else NORMAL_90
        return self.nats - factor * self.standard_error, self.nats + factor * self.standard_error

    @property
    def bits_per_dimension(self) -> float:
        """-`nats` in bits per value of the picture: what an ideal code based on the model takes."""
        return -self.nats / math.log(2) / self.dimensions


def discretized_log_prob(levels: Tensor, mean: Tensor, likelihood: Likelihood, log_scale: float) -> Tensor:
    """Return log p(levels | mean) in nats, summed over all dimensions but the first, (B,), in float64.

    Each level 0 ... 255 has the mass of the values that round to it, the outermost ones everything beyond. `mean` is in
    [-1, 1]; exp(log_scale) is the scale of a Laplace distribution or the variance of a normal one.
    """
    check_choice("decoder likelihood", likelihood, ("laplace", "normal"))
    levels, mean = levels.double(), mean.double()
    value = levels / 127.5 - 1
    scale = math.exp(log_scale) if likelihood == "laplace" else math.exp(log_scale / 2)
    low, high = (value - HALF_LEVEL - mean) / scale, (value + HALF_LEVEL - mean) / scale
    low, high = low.masked_fill(levels == 0, -math.inf), high.masked_fill(levels == 255, math.inf)
    flip = low + high > 0  # by symmetry, so that the tail that is subtracted is the small one
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_cdf = _log_laplace_cdf if likelihood == "laplace" else torch.special.log_ndtr
    upper, lower = log_cdf(high), log_cdf(low)
    return (upper + _log1mexp(upper - lower)).flatten(1).sum(1)


def _log_laplace_cdf(x: Tensor) -> Tensor:
    below = x.clamp(max=0) - math.log(2)
    return torch.where(x <= 0, below, torch.log1p(-0.5 * (-x.clamp(min=0)).exp()))


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(-x)) for x > 0."""
    return torch.where(x < math.log(2), (-torch.expm1(-x)).log(), torch.log1p(-(-x).exp()))


class LatentBound:
    """The terms of the bound on -log p(z | prompt) for a pipeline's UNet, in float64 on the CPU."""

    def __init__(self, pipe: ModelParts, variance: Variance = "beta", batch_size: int = 32) -> None:
        self.pipe, self.variance, self.batch_size = pipe, variance, batch_size
        self.process: Process = pipe.process

    @torch.no_grad()
    def terms(self, z: Tensor, noise: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Return L_t of latents z (N, c, h, w), noise of the same shape and timesteps t (N,) given text features."""
        schedule, weights = self.process.schedule, self.pipe.unet.conv_in.weight
        found = []
        for part in torch.split(torch.arange(len(z)), self.batch_size):
            x0, times = z[part].double(), t[part]
            x_t = add_noise(x0, noise[part].double(), times, schedule)
            inputs = x_t.to(weights), times.to(weights.device), context[part].to(weights)
            output = self.pipe.unet(*inputs).double().cpu()
            x0_hat = self.process.x0(output, x_t, times)
            found.append(bound_term(x0, x_t, x0_hat, times, self.variance, schedule))
        return torch.cat(found)

    def draw(
        self, posterior: DiagonalGaussian, context: Tensor, times: Tensor, weights: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw z once for each picture: z, L_T, L_0 and the estimated sum of L_t, t >= 1, all but z (N,).

        `times` (n,) are the timesteps to take for all pictures, `weights` (n,) what their terms are multiplied by. The
        noise belongs to the generator, not to the context: it is the same for every prompt.
        """
        shape = posterior.mean.shape
        z = posterior.mean.double() + posterior.std.double() * torch.randn(shape, generator=generator).double()
        count = len(times) + 1
        noise = torch.randn(count, *shape, generator=generator)
        steps = torch.cat([torch.zeros(1, dtype=torch.int64), times]).repeat_interleave(len(z))
        repeated = (each.repeat(count, *[1] * (each.dim() - 1)) for each in (z, context))
        latents, contexts = repeated
        terms = self.terms(latents, noise.flatten(0, 1), steps, contexts).view(count, len(z))
        return z, prior_term(z, self.process.schedule), terms[0], (weights[:, None] * terms[1:]).sum(0)


@torch.no_grad()
def log_likelihood(
    pipe: ModelParts,
    levels: Tensor,
    prompts: Sequence[str],
    proposal: Proposal,
    *,
    draws: int = 4,
    num_timesteps: int | None = 8,
    variance: Variance = "beta",
    posterior_floor: float = 0.0,
    decoder: bool = True,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Bound]:
    """Bound the log-probability of 8-bit pictures (N, 3, H, W) from below, each given its prompt; see the module.

    Args:
        pipe: the model.
        levels: uint8, of the model's size.
        prompts: one for each picture, taken literally; an empty one means that nothing is asked for.
        proposal: which timesteps to take.
        draws: independent estimates, at least 1.
        num_timesteps: t >= 1 per draw; None takes them all, which is exact for the noise that was drawn.
        variance: of the reverse steps, `beta` or `posterior`.
        posterior_floor: least standard deviation of q(z | x), in units of the latents' own.
        decoder: whether to add log p(levels | z), which does not depend on the prompt; without it, the decoder is not
            run, and `Bound.decoder` is nan.
        seed: of all noise, which does not depend on the prompts.
        batch_size: latents in the UNet at once.

    Raises:
        LatentDiffError: a number is out of range.
    """
    if draws < 1 or (num_timesteps is not None and num_timesteps < 1) or not posterior_floor >= 0:
        raise LatentDiffError(f"draws={draws}, num_timesteps={num_timesteps}, posterior_floor={posterior_floor}: "
                              "expected at least 1, 1 and 0")  # fmt: skip
    bound, generator = LatentBound(pipe, variance, batch_size), torch.Generator().manual_seed(seed)
    posterior = widened(encode(pipe, levels), posterior_floor)
    context = pipe.text_encoder(list(prompts)).cpu()
    entropy = 0.5 * (posterior.logvar.double() + math.log(2 * math.pi * math.e)).flatten(1).sum(1)
    parts: list[Tensor] = []
    for _ in range(draws):
        times, weights = stratified(proposal, num_timesteps, generator)
        z, prior, first, kl = bound.draw(posterior, context, times, weights, generator)
        fit = decoder_log_prob(pipe, levels, z) if decoder else torch.full_like(kl, math.nan)
        parts.append(torch.stack([fit, entropy, -prior, -kl, -first]))
    found = torch.stack(parts)  # (draws, parts, N)
    totals = found.nan_to_num(0.0).sum(1)  # without the decoder's part where it was not asked for, or cannot be known
    means = found.mean(0)
    names = ("decoder", "entropy", "prior", "kl", "first")
    return [
        Bound(**dict(zip(names, means[:, i].tolist(), strict=True)), by_draw=tuple(totals[:, i].tolist()),
              dimensions=levels[i].numel(), png=png_nats(levels[i]))
        for i in range(len(levels))
    ]  # fmt: skip


@torch.no_grad()
def measure_proposals(
    pipe: ModelParts,
    levels: Tensor,
    prompts: Sequence[str],
    *,
    variance: Variance = "beta",
    count: int = 24,
    seed: int = 1,
) -> Proposals:
    """Measure at which timesteps the terms of some pictures (N, 3, H, W) are large, and the difference a prompt makes.

    The noise is not that of the estimates (`seed`), so these stay unbiased even for the same pictures.
    """
    T, generator = pipe.process.schedule.num_timesteps, torch.Generator().manual_seed(seed)
    posterior, bound, times = encode(pipe, levels), LatentBound(pipe, variance), grid(T, count)
    kinds = [list(prompts), [""] * len(prompts)] if any(prompts) else [list(prompts)]
    contexts = [pipe.text_encoder(texts).cpu() for texts in kinds]
    with_prompt: list[Tensor] = []
    without: list[Tensor] = []
    for t in times:
        z = posterior.reparameterize(torch.randn(posterior.mean.shape, generator=generator))
        noise = torch.randn(z.shape, generator=generator)
        for context, found in zip(contexts, (with_prompt, without), strict=False):
            found.append(bound.terms(z, noise, t.expand(len(z)), context))
    terms = torch.stack(with_prompt)
    captions = Proposal.measured(times, terms - torch.stack(without), T) if without else None
    return Proposals(Proposal.measured(times, terms, T), captions)


@torch.no_grad()
@without_tf32()
def encode(pipe: ModelParts, levels: Tensor) -> DiagonalGaussian:
    """Return q(z | x) over latents for 8-bit pictures, on the CPU, encoded one by one."""
    weights = pipe.vae.decoder.conv_in.weight
    found = [pipe.vae.latent_posterior((one / 127.5 - 1).to(weights)) for one in torch.split(levels.float(), 1)]
    return DiagonalGaussian(*(torch.cat([getattr(each, name).float().cpu() for each in found])
                              for name in ("mean", "logvar")))  # fmt: skip


def widened(posterior: DiagonalGaussian, floor: float) -> DiagonalGaussian:
    """Return the posterior with standard deviations of at least `floor`: the bound holds for any width."""
    return DiagonalGaussian(posterior.mean, posterior.logvar.clamp(min=2 * math.log(floor))) if floor else posterior


@torch.no_grad()
def decoder_log_prob(pipe: ModelParts, levels: Tensor, z: Tensor) -> Tensor:
    """Return log p(levels | z) for the decoder's measured spread, (N,); nan if it was never measured."""
    facts = pipe.vae.facts
    if "decoder_log_scale" not in facts:
        return torch.full((len(levels),), math.nan, dtype=torch.float64)
    weights, likelihood = pipe.vae.decoder.conv_in.weight, facts.get("decoder_likelihood", "laplace")
    scale = float(facts["decoder_log_scale"])
    decoded = torch.cat([pipe.vae.decode(one.to(weights)).float().cpu() for one in torch.split(z, 1)])
    return discretized_log_prob(levels, decoded, likelihood, scale)  # type: ignore[arg-type]  # checked there


def png_nats(levels: Tensor) -> float:
    """Return what a PNG of the picture (3, H, W) takes, in nats."""
    buffer = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(buffer, "png", optimize=True)
    return 8 * len(buffer.getvalue()) * math.log(2)
