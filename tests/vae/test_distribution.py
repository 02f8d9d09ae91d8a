"""DiagonalGaussian against torch.distributions in float64."""

import torch
from torch.distributions import Independent, Normal, kl_divergence

from vae import DiagonalGaussian


def make(seed: int) -> tuple[DiagonalGaussian, Independent]:
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    return DiagonalGaussian(mean, logvar), Independent(Normal(mean, (0.5 * logvar).exp()), 3)


def test_kl_and_log_prob():
    (p, expected_p), (q, expected_q) = make(1), make(2)
    standard = Independent(Normal(torch.zeros_like(p.mean), torch.ones_like(p.mean)), 3)
    torch.testing.assert_close(p.kl(), kl_divergence(expected_p, standard), rtol=1e-12, atol=0)
    torch.testing.assert_close(p.kl(q), kl_divergence(expected_p, expected_q), rtol=1e-12, atol=0)
    value = torch.randn_like(p.mean)
    torch.testing.assert_close(p.log_prob(value), expected_p.log_prob(value), rtol=1e-12, atol=0)
    assert not p.kl(p).any()


def test_samples_have_the_moments():
    p = DiagonalGaussian(torch.full((200_000, 1, 1, 1), 2.0), torch.full((200_000, 1, 1, 1), -1.0))
    draws = p.sample(torch.Generator().manual_seed(0))
    assert abs(draws.mean() - 2.0) < 0.01
    assert abs(draws.var().log() + 1.0) < 0.02
    again = p.sample(torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    assert torch.equal(p.mode(), p.mean)


def test_log_variance_is_held_within_bounds():
    moments = torch.tensor([0.0, 1.0, -1e9, 1e9]).view(1, 4, 1, 1)
    p = DiagonalGaussian.from_moments(moments)
    assert p.logvar.flatten().tolist() == [-30.0, 20.0]
    assert p.mean.flatten().tolist() == [0.0, 1.0]
