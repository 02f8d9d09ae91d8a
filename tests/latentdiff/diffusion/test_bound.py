"""The bound's terms: on Gaussian data in closed form, and by the formula of improved-diffusion."""

import math

import numpy as np
import pytest
import torch

from latentdiff import Schedule
from latentdiff.diffusion.bound import bound_term, prior_term
from latentdiff.diffusion.process import add_noise, reverse_variance

EIGENVALUES = torch.logspace(-2, math.log10(4), 12, dtype=torch.float64)


def gaussian_x0(x_t, t, schedule, variances):
    """E[x0 | x_t] if x0 is normal with mean 0 and these variances, one per dimension."""
    alpha, sigma = schedule.at(t, x_t)
    return alpha * variances / (alpha**2 * variances + sigma**2) * x_t


def expected_bound(schedule, variance):
    """E of the bound over data and noise; two nodes of Gauss-Hermite are exact for its squares."""
    nodes = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    data, noise = (each.flatten()[:, None] for each in torch.meshgrid(nodes, nodes, indexing="ij"))
    x0 = data * EIGENVALUES.sqrt()
    noise = noise.expand_as(x0)
    total = prior_term(x0, schedule)
    for t in range(schedule.num_timesteps):
        step = torch.tensor(t)
        x_t = add_noise(x0, noise, step, schedule)
        total = total + bound_term(x0, x_t, gaussian_x0(x_t, step, schedule, EIGENVALUES), step, variance, schedule)
    return float(total.mean())


def closed_form_gap(schedule, variance):
    """KL of the true reverse kernels from the model's, and of the last marginal from the standard normal."""
    like = torch.zeros(1, 1, dtype=torch.float64)
    gap = 0.0
    for t in range(schedule.num_timesteps):
        before = schedule.alpha_prev[t] ** 2 * EIGENVALUES + schedule.sigma_prev[t] ** 2
        keep = 1 - schedule.betas[t]
        true = before - keep * before**2 / (keep * before + schedule.betas[t])  # Var[x_{t-1} | x_t]
        ratio = true / reverse_variance(torch.tensor(t), variance, schedule, like).item()
        gap += 0.5 * (ratio - 1 - ratio.log()).sum()
    last = schedule.alpha[-1] ** 2 * EIGENVALUES + schedule.sigma[-1] ** 2
    return float(gap + 0.5 * (last - 1 - last.log()).sum())


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_gaussian_data(variance):
    """The bound less the entropy of the data is the gap in closed form, and with beta's variance it falls as 1 / T.

    The posterior's variance is beta's times 0 at t = 0, about 1/2 at t = 1, 2/3 at t = 2, whatever T is: these steps'
    share of the gap stays.
    """
    entropy, gaps = 0.5 * (2 * math.pi * math.e * EIGENVALUES).log().sum().item(), {}
    for T in (100, 200, 400, 1000):
        schedule = Schedule.named("linear", T, beta_start=0.1 / T, beta_end=20 / T)
        gap = expected_bound(schedule, variance) - entropy
        assert gap == pytest.approx(closed_form_gap(schedule, variance), rel=0, abs=1e-8)
        gaps[T] = gap
    assert gaps[100] > gaps[200] > gaps[400] > gaps[1000] > 0
    if variance == "beta":
        assert gaps[100] / gaps[200] == pytest.approx(2, rel=0.05)
        assert gaps[200] / gaps[400] == pytest.approx(2, rel=0.02)
        assert gaps[400] / gaps[1000] == pytest.approx(2.5, rel=0.01)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_terms_equal_improved_diffusions(variance):
    """Its `normal_kl` of means and log-variances (arXiv 2102.09672), in NumPy from the betas."""
    schedule = Schedule.named("scaled_linear", 50)
    generator = torch.Generator().manual_seed(0)
    x0, x_t, guess = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    betas = schedule.betas.numpy()
    bars = np.cumprod(1 - betas)
    for t in (1, 7, 49):
        before = bars[t - 1]
        one = betas[t] * np.sqrt(before) / (1 - bars[t])
        other = (1 - before) * np.sqrt(1 - betas[t]) / (1 - bars[t])
        true = np.log(betas[t] * (1 - before) / (1 - bars[t]))
        model = np.log(betas[t]) if variance == "beta" else true
        means = [one * each.numpy() + other * x_t.numpy() for each in (x0, guess)]
        kl = 0.5 * (-1 + model - true + np.exp(true - model) + (means[0] - means[1]) ** 2 * np.exp(-model))
        found = bound_term(x0, x_t, guess, torch.full((3,), t), variance, schedule)
        assert np.abs(found.numpy() - kl.reshape(3, -1).sum(1)).max() < 1e-8 * kl.sum()
