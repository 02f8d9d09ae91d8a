"""The bound approaches the true negative log-likelihood, with an exact denoiser and quadrature instead of sampling."""

import math

import numpy as np
import pytest
import torch

from latentdiff import Schedule
from latentdiff.diffusion.bound import bound_term, prior_term
from latentdiff.diffusion.process import add_noise


def nodes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights of Gauss-Hermite quadrature for expectations under N(0, 1)."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(points), torch.from_numpy(weights / math.sqrt(2 * math.pi))


def gap(data, T: int, variance: str, count: int = 32) -> float:
    """Expected bound minus expected -log p(x0), in bits per dimension; linear betas, scaled by 1000/T from DDPM's."""
    schedule = Schedule.named("linear", T, beta_start=0.1 / T, beta_end=20 / T)
    points, weights = nodes(count)
    x0 = (data.means + data.stds * points).view(-1, 1)  # (K * n, 1)
    w0 = (data.weights[:, None] * weights).view(-1)
    repeated = x0.repeat_interleave(count, 0)  # every x0 with every noise
    w = (w0[:, None] * weights).view(-1)
    noise = points.repeat(len(x0))[:, None]
    bound = (w0 * prior_term(x0, schedule)).sum()
    for t in range(T):
        step = torch.tensor(t)
        x_t = add_noise(repeated, noise, step, schedule)
        x0_hat = data.denoise(x_t, schedule.alpha[t], schedule.sigma[t])
        bound += (w * bound_term(repeated, x_t, x0_hat, step, variance, schedule)).sum()
    truth = -(w0 * data.log_density(x0)).sum()
    return float(bound - truth) / math.log(2)


@pytest.fixture(autouse=True)
def _no_denormals():
    """Densities far from every mode would be denormals, a hundred times slower than zeros."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("T", "expected"), [(100, 0.014), (1000, 0.0014), pytest.param(4000, 0.0004, marks=pytest.mark.slow)]
)
def test_gap_shrinks_as_one_over_T(mixture, T, expected):
    data = mixture([0.5, 0.5], [-1, 1], [0.5, 0.5])
    found = gap(data, T, "beta")
    assert found > 0
    assert found == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("std", "expected"), [(0.1, 0.029), (0.03, 0.12)])
def test_narrow_modes_cost_more(mixture, std, expected):
    """The variance beta_0 of the last step makes a decoder that cannot be sharper than the first noise level."""
    data = mixture([0.5, 0.5], [-1, 1], [std, std])
    found = gap(data, 1000, "beta", count=48)
    assert found == pytest.approx(expected, rel=0.15)


@pytest.mark.slow
def test_posterior_variance_is_a_looser_bound_on_spread_out_data(mixture):
    """The true reverse variance of the first steps exceeds the posterior's; see the docstring of `reverse_variance`."""
    data = mixture([0.5, 0.3, 0.2], [-1.0, 0.3, 1.2], [0.5, 0.4, 0.3])
    tight, loose = gap(data, 1000, "beta"), gap(data, 1000, "posterior")
    assert 0 < tight < 0.01
    assert 0.3 < loose < 0.8
