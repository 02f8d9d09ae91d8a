"""Which caption fits a picture, by the difference that it makes to the bound on the latents' probability."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vae import DiagonalGaussian

from ..diffusion.process import Variance
from ..sampling.parts import ModelParts
from .likelihood import LatentBound, encode, widened
from .proposal import Proposal, stratified


@dataclass(frozen=True)
class Evidence:
    """How much more probable captions make a picture's latents: log p(z | caption) - log p(z | nothing), in nats."""

    captions: tuple[str, ...]
    by_draw: Tensor  # (draws, captions), of the difference of the two bounds

    @property
    def nats(self) -> Tensor:
        """The estimates, one per caption."""
        return self.by_draw.mean(0)

    @property
    def standard_error(self) -> Tensor:
        """Their standard errors; nan for a single draw."""
        return self.by_draw.std(0) / math.sqrt(len(self.by_draw))

    @property
    def best(self) -> str:
        """The caption that fits best."""
        return self.captions[int(self.nats.argmax())]


@torch.no_grad()
def evidence(
    pipe: ModelParts,
    levels: Tensor,
    captions: Sequence[Sequence[str]],
    proposal: Proposal,
    *,
    draws: int = 1,
    num_timesteps: int | None = 8,
    variance: Variance = "beta",
    posterior_floor: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Evidence]:
    """Compare captions by the difference each makes to the bound of a picture's latents, with the same noise for all.

    Raw bits per dimension cannot rank captions, nor pictures: they say how smooth a picture is above all. `levels` are
    uint8 (N, 3, H, W), `captions` has a list for each; `proposal` is `Proposals.captions`.
    """
    bound, posterior = LatentBound(pipe, variance, batch_size), widened(encode(pipe, levels), posterior_floor)
    found = []
    for index, candidates in enumerate(captions):
        generator = torch.Generator().manual_seed(seed + index)
        context = pipe.text_encoder([*candidates, ""]).cpu()
        same = DiagonalGaussian(*(each[index : index + 1].expand(1, *each.shape[1:])
                                  for each in (posterior.mean, posterior.logvar)))  # fmt: skip
        rows = []
        for _ in range(draws):
            times, weights = stratified(proposal, num_timesteps, generator)
            z = same.reparameterize(torch.randn(same.mean.shape, generator=generator))
            noise = torch.randn(len(times), *z.shape[1:], generator=generator)
            count = len(context)
            terms = bound.terms(z.expand(len(times) * count, *z.shape[1:]), noise.repeat_interleave(count, 0),
                                times.repeat_interleave(count), context.repeat(len(times), 1, 1))  # fmt: skip
            sums = (weights[:, None] * terms.view(len(times), count)).sum(0)
            rows.append(sums[-1] - sums[:-1])
        found.append(Evidence(tuple(candidates), torch.stack(rows)))
    return found
