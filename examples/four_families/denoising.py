"""Diffusion in pixel space: p(x) is a chain of small Gaussian steps back from noise, all by latentdiff.diffusion."""

import torch
import torch.nn.functional as F
from pictures import SIZE, to_levels, to_pixels
from torch import Tensor, nn

from latentdiff import Schedule
from latentdiff.diffusion.bound import bound_term, prior_term
from latentdiff.diffusion.process import Process, Weighting, add_noise, diffusion_loss, posterior, sample_timesteps
from latentdiff.diffusion.samplers import make_rows, sample
from latentdiff.evaluation.likelihood import discretized_log_prob
from unet import UNet, UNetConfig

STEPS = 250
CONTEXT = 8  # a text feature that is always zero, as the UNet expects one
PATCH = 2  # the UNet sees 8x8 patches of 12 values, which is three times cheaper
NETWORK = UNetConfig(sample_size=8, in_channels=12, out_channels=12, block_out_channels=(32, 80), num_heads=1,
                     layers_per_block=1, attention_levels=(), context_dim=CONTEXT, norm_groups=8)  # fmt: skip


class Unconditional(nn.Module):
    """Predicts v with the UNet of this project, without a prompt.

    The UNet sees x_t scaled to unit variance, and predicts what remains of x0 after the best guess from each value's
    mean and spread in training, scaled likewise (Karras et al. 2022, arXiv 2206.00364, section 5, with one spread).
    """

    mean: Tensor  # of the training pictures' values, (3, 16, 16)
    spread: Tensor  # their standard deviations

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.unet, self.schedule = UNet(NETWORK), schedule
        self.register_buffer("mean", torch.zeros(3, SIZE, SIZE))
        self.register_buffer("spread", torch.ones(3, SIZE, SIZE))

    def measure(self, pixels: Tensor) -> None:
        """Measure mean and spread of training pictures (N, 3, 16, 16)."""
        self.mean.copy_(pixels.mean(0))
        self.spread.copy_(pixels.std(0).clamp(min=0.05))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict v from x_t (B, 3, 16, 16)."""
        alpha, sigma = self.schedule.at(t, x)
        deviation = (alpha**2 * self.spread**2 + sigma**2).sqrt()  # of x_t
        unit = (x - alpha * self.mean) / deviation
        patches = self.unet(F.pixel_unshuffle(unit, PATCH), t, torch.zeros(len(x), 1, CONTEXT))
        residual = F.pixel_shuffle(patches, PATCH)
        x0 = self.mean + self.spread / deviation * (alpha * self.spread * unit + sigma * residual)
        return (alpha * x - x0) / sigma


class Diffusion(nn.Module):
    """A network for v, with the steps, the bound and the draws that follow from it."""

    def __init__(
        self, network: nn.Module | None = None, schedule: Schedule | None = None, weighting: Weighting = "simple"
    ) -> None:
        super().__init__()
        self.weighting, schedule = weighting, schedule or Schedule.named("cosine", STEPS)
        self.network = network or Unconditional(schedule)
        self.process = Process(schedule, "v")

    def loss(self, x: Tensor) -> Tensor:
        """Return the mean weighted squared error of v at random timesteps."""
        schedule, x0 = self.process.schedule, to_pixels(x)
        noise, t = torch.randn_like(x0), sample_timesteps(len(x), self.process.schedule.num_timesteps)
        output = self.network(add_noise(x0, noise, t, schedule), t)
        return diffusion_loss(output, x0, noise, t, "v", schedule, weighting=self.weighting).mean()

    @torch.no_grad()
    def log_prob(self, x: Tensor, generator: torch.Generator, every: int = 5) -> Tensor:
        """Return an unbiased estimate of the bound on log p(x) in nats, (B,), from one in `every` timesteps t >= 1.

        The term of t = 0 is the mass that the last Gaussian step has on the levels, not a density.
        """
        schedule, x0 = self.process.schedule, to_pixels(x)
        bound = prior_term(x0.double(), schedule)
        first = torch.randint(0, every, (len(x),), generator=generator)
        for start in [-1, *range(0, schedule.num_timesteps - 1, every)]:
            t = torch.zeros_like(first) if start < 0 else 1 + start + first
            inside = (t < schedule.num_timesteps).double()
            t = t.clamp(max=schedule.num_timesteps - 1)
            x_t = add_noise(x0, torch.randn(x0.shape, generator=generator), t, schedule)
            estimate = self.denoise(x_t, t)
            if start < 0:
                mean, log_var = posterior(estimate, x_t, t, schedule).mean, schedule.betas[0].log().item()
                bound -= discretized_log_prob(x, mean, "normal", log_var)
            else:
                term = bound_term(x0.double(), x_t.double(), estimate.double(), t, "beta", schedule)
                bound += every * inside * term
        return -bound

    def denoise(self, x: Tensor, t: Tensor | int) -> Tensor:
        """Return the estimate of x0, within the range that pixels have."""
        t = torch.as_tensor(t)
        return self.process.x0(self.network(x, t), x, t).clamp(-1, 1)

    @torch.no_grad()
    def from_code(self, z: Tensor, steps: int = 25) -> Tensor:
        """Return what DDIM, which adds no noise, makes of x_T = z, as levels."""
        *_, last = sample(self.denoise, z, make_rows("ddim", self.process.schedule, steps))
        return to_levels(last.x)

    def new_code(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw x_T from the prior."""
        return torch.randn(count, 3, 16, 16, generator=generator)

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator, steps: int | None = None) -> Tensor:
        """Draw pictures by ancestral sampling, by default in all T steps."""
        schedule, start = self.process.schedule, self.new_code(count, generator)
        rows = make_rows("ddpm", schedule, steps or schedule.num_timesteps)
        noise = lambda _: torch.randn(start.shape, generator=generator)  # noqa: E731
        *_, last = sample(self.denoise, start, rows, noise)
        return to_levels(last.x)

    @torch.no_grad()
    def rebuild(self, x: Tensor, generator: torch.Generator, steps: int = 25) -> Tensor:
        """Noise pictures halfway (alpha = sigma for the cosine schedule) and take them back by DDIM, as levels."""
        schedule = self.process.schedule
        rows = [row for row in make_rows("ddim", schedule, steps) if row.t <= schedule.num_timesteps // 2]
        x0 = to_pixels(x)
        noisy = add_noise(x0, torch.randn(x0.shape, generator=generator), torch.tensor(rows[0].t), schedule)
        *_, last = sample(self.denoise, noisy, rows)
        return to_levels(last.x)
