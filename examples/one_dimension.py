"""Diffusion in one dimension, where every density is known in closed form: one self-explanatory picture.

    python examples/one_dimension.py --output outputs/one_dimension.png

1. Forward: three bumps dissolve into N(0, 1), by x_t = alpha_t x0 + sigma_t noise.
2. Backward, exact: Bayes' rule gives q(x_{t-1} | x_t), nearly Gaussian if the step is small, but not if it is large.
3. Backward, learned: so a chain of small Gaussian steps suffices, and a network learns the mean of each.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentdiff import Schedule
from latentdiff.diffusion.process import (
    add_noise,
    diffusion_loss,
    forward_step,
    from_x0,
    sample_timesteps,
    target,
    to_x0,
)
from latentdiff.diffusion.samplers import make_rows, sample

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # without pyplot: renders with Agg and needs no display
except ModuleNotFoundError:
    sys.exit("this example needs matplotlib: pip install 'latentdiff[examples]'")

EXACT, GAUSSIAN, LEARNED, QUIET = "#1d4e89", "#e07a1f", "#12805c", "#555555"  # one color, one meaning
GRID = torch.linspace(-5, 5, 20_001, dtype=torch.float64)
HERE = -0.75  # the x_t from which part 2 steps back: between two bumps
TRAIN_STEPS, BATCH, CHAIN_STEPS, SAMPLES = 3000, 1024, 250, 20_000


# --- the data and the forward process ---


def normal(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Return the density of N(mean, var) at x."""
    return torch.exp(-(x - mean).square() / (2 * var)) / (2 * math.pi * var).sqrt()


class Mixture(NamedTuple):
    """A one-dimensional mixture of K Gaussians; each field is (..., K)."""

    weight: Tensor
    mean: Tensor
    std: Tensor

    def sample(self, count: int) -> Tensor:
        """Return independent samples, (count, 1), in float32 for the network."""
        which = torch.multinomial(self.weight, count, replacement=True)
        return (self.mean[which] + self.std[which] * torch.randn(count)).float()[:, None]

    def density(self, x: Tensor) -> Tensor:
        """Return the probability density at x."""
        return (self.weight * normal(x[..., None], self.mean, self.std.square())).sum(-1)

    def noised(self, alpha: Tensor, sigma: Tensor) -> Mixture:
        """Return the distribution of alpha * x0 + sigma * noise: again a mixture, each Gaussian shifted and widened."""
        alpha, sigma = alpha[..., None], sigma[..., None]
        return Mixture(self.weight, alpha * self.mean, ((alpha * self.std).square() + sigma.square()).sqrt())

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x0 | x_t = x]: the estimate of each Gaussian, weighted by the probability that x came from it."""
        noised = self.noised(alpha, sigma)
        share = self.weight * normal(x[..., None], noised.mean, noised.std.square())
        estimate = self.mean + alpha[..., None] * (self.std / noised.std).square() * (x[..., None] - noised.mean)
        return (share * estimate).sum(-1) / share.sum(-1)


DATA = Mixture(*torch.tensor([[0.3, 0.45, 0.25], [-1.3, 0.05, 1.4], [0.13, 0.28, 0.18]], dtype=torch.float64))


# --- one exact step back ---


def reverse_conditional(data: Mixture, x_t: float, t: int, schedule: Schedule) -> Tensor:
    """Return q(x_{t-1} | x_t) on GRID by Bayes' rule: q(x_t | x_{t-1}) q(x_{t-1}) / q(x_t)."""
    here = torch.tensor(x_t, dtype=torch.float64)
    likelihood = normal(here, *forward_step(GRID, torch.tensor(t), schedule))
    prior = data.noised(schedule.alpha_prev[t], schedule.sigma_prev[t]).density(GRID)
    evidence = data.noised(schedule.alpha[t], schedule.sigma[t]).density(here)
    return likelihood * prior / evidence


def matched_gaussian(density: Tensor) -> tuple[Tensor, float, float]:
    """Return the Gaussian with the mean and variance of a density on GRID, that mean, and the standard deviation."""
    mean = torch.trapezoid(GRID * density, GRID)
    var = torch.trapezoid((GRID - mean).square() * density, GRID)
    return normal(GRID, mean, var), mean.item(), var.sqrt().item()


def total_variation(p: Tensor, q: Tensor) -> float:
    """Return the share of the probability (0 to 1) that must move to turn one density on GRID into the other."""
    return 0.5 * torch.trapezoid((p - q).abs(), GRID).item()


def step_back(num_timesteps: int) -> Tensor:
    """Return q(x_{t-1} | x_t = HERE) at t = T/4, where `cosine` has the same alpha_t for every T."""
    return reverse_conditional(DATA, HERE, num_timesteps // 4 - 1, Schedule.named("cosine", num_timesteps))


# --- the learned way back ---


def predict(network: nn.Module, x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return the network's v, (B, 1), given x_t and the amounts of signal and noise in it."""
    alpha, sigma = schedule.at(t, x)
    return network(torch.cat([x, alpha.expand_as(x), sigma.expand_as(x)], dim=1))


def train(schedule: Schedule) -> tuple[nn.Module, Tensor]:
    """Train a network; returns it, and its loss and the exact denoiser's on the same batches, (TRAIN_STEPS, 2)."""
    layers = [nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(network.parameters())
    learning_rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=TRAIN_STEPS)
    losses = torch.empty(TRAIN_STEPS, 2)
    for step in range(TRAIN_STEPS):
        x0 = DATA.sample(BATCH)
        noise = torch.randn_like(x0)
        t = sample_timesteps(BATCH, schedule.num_timesteps)
        x_t = add_noise(x0, noise, t, schedule)
        loss = diffusion_loss(predict(network, x_t, t, schedule), x0, noise, t, "v", schedule).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate.step()
        # x_t does not determine its noise, so even the best possible v misses its target: the loss has a floor.
        best = from_x0(DATA.denoise(x_t, *schedule.at(t, x_t)), x_t, t, "v", schedule)
        floor = (best - target(x0, noise, t, "v", schedule)).square().mean()
        losses[step] = torch.stack([loss.detach(), floor])
    return network, losses


@torch.no_grad()
def run_chain(network: nn.Module, schedule: Schedule) -> tuple[list[float], Tensor]:
    """Go from noise to data in CHAIN_STEPS Gaussian steps; returns the times t/T and the x there, (times, SAMPLES)."""

    def denoise(x: Tensor, t: int) -> Tensor:
        now = torch.tensor(t)
        return to_x0(predict(network, x, now, schedule), x, now, "v", schedule)

    start, rows = torch.randn(SAMPLES, 1), make_rows("ddpm", schedule, CHAIN_STEPS)
    path = [start, *(step.x for step in sample(denoise, start, rows))]
    times = [(row.t + 1) / schedule.num_timesteps for row in rows]
    return [*times, 0.0], torch.cat(path, dim=1).T


def ks_distance(samples: Tensor, data: Mixture) -> float:
    """Return the Kolmogorov-Smirnov distance: the largest gap between the empirical and the true CDF."""
    x = samples.double().sort().values[:, None]
    truth = (data.weight * torch.special.ndtr((x - data.mean) / data.std)).sum(-1)
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return torch.maximum(truth - steps[:-1], steps[1:] - truth).max().item()


# --- the picture ---

PANELS = {  # title: caption
    "1   Forward: the data dissolve into noise": r"Every column is the density of $x_t = \alpha_t\,x_0 + \sigma_t\,$"
    "noise; seven are drawn sideways as lines. The three bumps of the data (left) widen, merge and end as N(0, 1).",
    "2a   One step back out of 8": rf"$q(x_{{t-1}}\,|\,x_t)$ for $x_t = {HERE}$, between two bumps:" + "\n"
    "so big a step has two answers, left or right.",
    "2b   One step out of 40": "From the same point at the same noise level, a\n"
    "smaller step has one answer, a bit lopsided.",
    "2c   One step out of 1000": "A Gaussian, to the eye. So a chain of many\n"
    "Gaussian steps can lead back to the data.",
    "2d   How fast it gets there": "Total variation is half the orange area. Ten times\n"
    "the steps make each 30 times closer to Gaussian.",
    "3a   A network learns the way back": "Its loss falls to that of the exact denoiser, not to 0, because\n"
    "$x_t$ does not tell which noise is in it.",
    "3b   The learned chain sorts noise into data": f"20 walks of {CHAIN_STEPS} Gaussian steps over the densities "
    "of part 1:\nfrom N(0, 1), on the left, to the three bumps.",
    "3c   What comes out is what went in": f"{SAMPLES:,} samples (green), density of the data (blue). KS distance:\n"
    "the largest gap between their cumulative curves.",
}


def explain(ax: Axes, title: str, caption: str) -> None:
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    ax.annotate(caption, (0, 1), (0, 8), color=QUIET, **above)
    ax.annotate(title, (0, 1), (0, 14 + 15 * (caption.count("\n") + 1)), fontsize=14, fontweight="bold", **above)
    ax.spines[["top", "right"]].set_visible(False)


def heat_map(ax: Axes, schedule: Schedule) -> None:
    x = torch.linspace(-3.2, 3.2, 400, dtype=torch.float64)
    density = DATA.noised(schedule.alpha[:, None], schedule.sigma[:, None]).density(x)
    shade = density.T.sqrt().numpy()  # square root, to make thin tails visible
    ax.imshow(shade, cmap="Blues", vmax=1.2, aspect="auto", origin="lower", extent=(0, 1, -3.2, 3.2))
    ax.set(xlabel="time $t\\,/\\,T$", ylabel="$x_t$", ylim=(-3.2, 3.2))


def plot_forward(ax: Axes, schedule: Schedule) -> None:
    heat_map(ax, schedule)
    scale = 0.065  # of a density plotted sideways, in units of t / T
    for time in (0.0, 0.1, 0.25, 0.4, 0.6, 0.8, 1.0):
        t = max(round(time * schedule.num_timesteps) - 1, 0)
        ax.plot(time + scale * DATA.noised(schedule.alpha[t], schedule.sigma[t]).density(GRID), GRID, color=EXACT)
    ax.plot(1 + scale * normal(GRID, torch.zeros(()), torch.ones(())), GRID, "--", color=GAUSSIAN, linewidth=2)
    ax.text(1.025, 1.1, "N(0, 1)", color=GAUSSIAN)
    ax.annotate("part 2 starts here", (0.25, HERE), (0.245, -2.7), ha="right", arrowprops={"arrowstyle": "-|>"})
    ax.set_xlim(0, 1.06)


def plot_step_back(ax: Axes, num_timesteps: int) -> str:
    exact = step_back(num_timesteps)
    gaussian, mean, std = matched_gaussian(exact)
    result = f"total variation {100 * total_variation(exact, gaussian):.2g} %"
    ax.fill_between(GRID, exact, gaussian, color=GAUSSIAN, alpha=0.3, linewidth=0)
    ax.plot(GRID, exact, color=EXACT, linewidth=2.2)
    ax.plot(GRID, gaussian, "--", color=GAUSSIAN, linewidth=2)
    ax.set(xlim=(mean - 4 * std, mean + 4 * std), ylim=(0, 1.3 * exact.max().item()), yticks=[], xlabel="$x_{t-1}$")
    ax.text(0.03, 0.93, result, transform=ax.transAxes)
    for y, name, color in ((0.93, "exact", EXACT), (0.86, "Gaussian", GAUSSIAN)):
        ax.text(0.97, y, name, color=color, transform=ax.transAxes, ha="right")
    return f"one step back out of {num_timesteps}, from a Gaussian: {result}"


def plot_rate(ax: Axes) -> None:
    counts = [8, 16, 40, 100, 200, 400, 1000]
    gaps = [total_variation(exact, matched_gaussian(exact)[0]) for exact in map(step_back, counts)]
    ax.loglog(counts, gaps, "o-", color=EXACT)
    ax.loglog(counts, [2 * gaps[-1] * (1000 / count) ** 1.5 for count in counts], color=QUIET, linewidth=1)
    ax.text(120, 9e-3, "slope $-3\\,/\\,2$", color=QUIET)
    ax.set(xlabel="number of steps $T$", ylabel="total variation")


def plot_loss(ax: Axes, losses: Tensor) -> str:
    smooth = losses.unfold(0, 100, 1).mean(-1)  # of the last 100 steps
    for column, color, width in ((1, EXACT, 2), (0, LEARNED, 1)):
        ax.plot(range(100, 100 + len(smooth)), smooth[:, column], color=color, linewidth=width)
    (first, _), (last, floor) = losses[:100].mean(0), losses[-500:].mean(0)
    result = f"loss {first:.3f} to {last:.3f}, exact denoiser {floor:.3f}"
    ax.set(xlabel="training step", xlim=(0, TRAIN_STEPS))
    ax.set_ylabel(r"squared error of $v = \alpha_t\,$noise$\,-\,\sigma_t\,x_0$")
    ax.text(0.97, 0.93, result, transform=ax.transAxes, ha="right")
    ax.text(0.2, 0.6, "network", color=LEARNED, transform=ax.transAxes)
    ax.text(0.02, 0.02, "exact denoiser", color=EXACT, transform=ax.transAxes)
    return result


def plot_chain(ax: Axes, schedule: Schedule, times: list[float], path: Tensor) -> None:
    heat_map(ax, schedule)
    ax.plot(times, path[:, :20], color=LEARNED, linewidth=0.8, alpha=0.85)
    ax.set_xlim(1, 0)  # time runs backwards


def plot_samples(ax: Axes, samples: Tensor) -> str:
    result = f"KS distance {ks_distance(samples, DATA):.3f}"
    ax.hist(samples, bins=100, range=(-2.2, 2.4), density=True, color=LEARNED, alpha=0.45)
    ax.plot(GRID, DATA.density(GRID), color=EXACT)
    ax.set(xlim=(-2.2, 2.4), yticks=[], xlabel="$x_0$")
    true = f"(true samples: about {0.87 / math.sqrt(SAMPLES):.3f})"  # 0.87: the mean of Kolmogorov's distribution
    ax.text(0.98, 0.88, f"{result}\n{true}", transform=ax.transAxes, ha="right")
    return result


def plot(schedule: Schedule, losses: Tensor, times: list[float], path: Tensor) -> tuple[Figure, list[str]]:
    """Plot the complete figure; returns it and the results that its panels state."""
    figure = Figure(figsize=(17, 15.5), dpi=110)
    figure.text(0.045, 0.968, "Diffusion in one dimension", fontsize=22, fontweight="bold")
    figure.text(0.36, 0.968, "Blue is exact, orange is Gaussian, green is learned.", fontsize=15, color=QUIET)
    axes: list[Axes] = []
    for columns, bottom, top in ((1, 0.70, 0.905), (4, 0.39, 0.59), (3, 0.045, 0.275)):
        grid = figure.add_gridspec(1, columns, left=0.045, right=0.985, bottom=bottom, top=top)
        axes += [figure.add_subplot(grid[column]) for column in range(columns)]
    for ax, (title, caption) in zip(axes, PANELS.items(), strict=True):
        explain(ax, title, caption)
    plot_forward(axes[0], schedule)
    gaps = [plot_step_back(ax, num_timesteps) for ax, num_timesteps in zip(axes[1:4], (8, 40, 1000), strict=True)]
    plot_rate(axes[4])
    loss = plot_loss(axes[5], losses)
    plot_chain(axes[6], schedule, times, path)
    return figure, [*gaps, loss, plot_samples(axes[7], path[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/one_dimension.png"), help="file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and sampling")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # with matrices this small, more threads are slower
    schedule = Schedule.named("cosine", zero_terminal_snr=True)
    network, losses = train(schedule)
    figure, results = plot(schedule, losses, *run_chain(network, schedule))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)
    print(*results, f"picture: {args.output}", sep="\n")


if __name__ == "__main__":
    main()
