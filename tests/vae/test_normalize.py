"""Latent statistics against explicit samples and exact formulas; what folding them into the weights preserves."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import AutoencoderKL

from vae import VAE, DiagonalGaussian, LatentStatistics, VAEConfig, VAEError, fold_statistics

SMALL = VAEConfig(
    block_out_channels=(16, 32),
    latent_channels=3,
    norm_groups=8,
    layers_per_block=1,
    scale_factor=0.3,
    shift_factor=0.7,
)


def make_vae(dtype=torch.float64, **changes) -> VAE:
    """A VAE whose posterior channels differ widely in mean and spread, as after training."""
    vae = VAE(VAEConfig(**{**vars(SMALL), **changes})).to(dtype).eval()
    for name, parameter in vae.named_parameters():
        if name.startswith(("encoder.conv_out", "quant_conv", "post_quant_conv")):
            torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 and parameter.shape[-1] > 1 else 0.7)
    return vae.requires_grad_(False)


def statistics_of(vae: VAE, pixels: torch.Tensor) -> LatentStatistics:
    statistics = LatentStatistics(vae.config.latent_channels)
    for batch in pixels.split(3):
        statistics.add(vae.posterior(batch))
    return statistics


@pytest.fixture
def pixels():
    return torch.rand(8, 3, 16, 8, dtype=torch.float64) * 2 - 1


@pytest.fixture
def posterior():
    """Skewed, correlated, and far from the origin: (500, 3, 2, 2)."""
    base = torch.randn(500, 3, 2, 2, dtype=torch.float64)
    mean = torch.stack([base[:, 0].exp(), 3 * base[:, 1] - base[:, 0] - 7, 0.1 * base[:, 2]], 1)
    logvar = torch.randn_like(base) + torch.tensor([-4.0, 1.0, 0.0])[:, None, None]
    return DiagonalGaussian(mean, logvar)


# --- statistics ---


def test_moments_are_exact(posterior):
    """Compare with central moments of the mixture, computed about its mean without cancellation."""
    statistics = LatentStatistics(3)
    for mean, logvar in zip(posterior.mean.split(7), posterior.logvar.split(7), strict=True):
        statistics.add(DiagonalGaussian(mean, logvar))
    mu, var = (x.movedim(1, -1).reshape(-1, 3) for x in (posterior.mean, posterior.logvar.exp()))
    d = mu - mu.mean(0)
    second, third = (d**2 + var).mean(0), (d**3 + 3 * d * var).mean(0)
    fourth = (d**4 + 6 * d**2 * var + 3 * var**2).mean(0)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(statistics.mean, mu.mean(0), **close)
    torch.testing.assert_close(statistics.std, second.sqrt(), **close)
    torch.testing.assert_close(statistics.covariance, d.T @ d / len(d) + var.mean(0).diag(), **close)
    torch.testing.assert_close(statistics.skewness, third / second**1.5, **close)
    torch.testing.assert_close(statistics.excess_kurtosis, fourth / second**2 - 3, **close)
    torch.testing.assert_close(statistics.correlation.diagonal(), torch.ones(3).double(), **close)
    assert statistics.kl == pytest.approx(float(posterior.kl().mean()), rel=1e-12)
    assert statistics.bits_per_dimension == pytest.approx(statistics.kl / 12 / math.log(2), rel=1e-12)
    assert statistics.num_pictures == 500


def test_explicit_draws(posterior):
    """200k samples per channel, by numpy and scipy; standard errors from 50 parts of them."""
    statistics = LatentStatistics(3)
    statistics.add(posterior)
    draws = torch.stack([posterior.sample() for _ in range(100)])
    draws = draws.permute(0, 1, 3, 4, 2).reshape(50, -1, 3).numpy()  # (parts, samples, channels)
    assert draws[..., 0].size == 200_000
    measures = {
        "mean": lambda x: x.mean(0),
        "std": lambda x: x.std(0),
        "skewness": lambda x: scipy.stats.skew(x),
        "excess_kurtosis": lambda x: scipy.stats.kurtosis(x),
        "correlation": lambda x: np.corrcoef(x.T),
    }
    for name, measure in measures.items():
        whole = measure(draws.reshape(-1, 3))
        error = np.std([measure(part) for part in draws], axis=0, ddof=1) / np.sqrt(50)
        assert (np.abs(getattr(statistics, name).numpy() - whole) <= 4 * error + 1e-12).all(), name


def test_a_mean_far_from_zero_costs_few_digits():
    """At mean = 100 std, the kurtosis is still accurate to 1e-5."""
    mean = 100.0 + 0.6 * torch.randn(200, 1, 4, 4, dtype=torch.float64)
    near, far = LatentStatistics(1), LatentStatistics(1)
    logvar = torch.full_like(mean, math.log(0.64))
    near.add(DiagonalGaussian(mean - 100.0, logvar))
    far.add(DiagonalGaussian(mean, logvar))
    for name, tolerance in (("std", 1e-11), ("skewness", 1e-7), ("excess_kurtosis", 1e-5)):
        torch.testing.assert_close(getattr(far, name), getattr(near, name), rtol=0, atol=tolerance)


def test_states_add_up(posterior):
    whole, parts = LatentStatistics(3), [LatentStatistics(3), LatentStatistics(3)]
    whole.add(posterior)
    for part, picked in zip(parts, (slice(0, 123), slice(123, None)), strict=True):
        part.add(DiagonalGaussian(posterior.mean[picked], posterior.logvar[picked]))
    merged = LatentStatistics.from_state(parts[0].state() + parts[1].state())
    parts[0].merge(parts[1].state())
    for statistics in (merged, parts[0]):
        torch.testing.assert_close(statistics.state(), whole.state(), rtol=1e-12, atol=0)
    assert merged.num_pictures == 500
    merged.state().zero_()  # a copy
    assert merged.num_pictures == 500


def test_low_precision_posteriors_are_summed_in_float64(posterior):
    statistics, expected = LatentStatistics(3), LatentStatistics(3)
    half = DiagonalGaussian(posterior.mean.bfloat16().requires_grad_(), posterior.logvar.bfloat16())
    statistics.add(half)
    expected.add(DiagonalGaussian(half.mean.detach().double(), half.logvar.double()))
    assert torch.equal(statistics.state(), expected.state())
    assert not statistics.state().requires_grad


@pytest.mark.parametrize("name", ["mean", "std", "skewness", "excess_kurtosis", "correlation", "kl", "kl_per_channel"])
def test_nothing_added(name):
    with pytest.raises(VAEError, match="no image was added"):
        getattr(LatentStatistics(3), name)


def test_wrong_statistics(posterior):
    with pytest.raises(VAEError, match=r"expected \(B, 4, height, width\)"):
        LatentStatistics(4).add(posterior)
    for state in (torch.zeros(5, 3, dtype=torch.float64), torch.zeros(9, 3)):
        with pytest.raises(VAEError, match="state is"):
            LatentStatistics.from_state(state)


# --- folding ---


def test_code_is_normalised_and_pictures_stay(pixels, relative_error):
    vae = make_vae()
    before, statistics = vae.posterior(pixels), statistics_of(vae, pixels)
    picture = vae.decode(vae.encode(pixels))
    fold_statistics(vae, statistics.mean, statistics.std)
    assert (vae.config.scale_factor, vae.config.shift_factor) == (1.0, 0.0)
    mean, std = (x.view(3, 1, 1) for x in (statistics.mean, statistics.std))
    after = vae.posterior(pixels)
    assert relative_error(after.mean, (before.mean - mean) / std) < 1e-12
    assert relative_error(after.std, before.std / std) < 1e-12
    assert torch.equal(vae.encode(pixels), after.mean)
    assert relative_error(vae.decode(vae.encode(pixels)), picture) < 1e-12
    folded = statistics_of(vae, pixels)
    torch.testing.assert_close(folded.mean, torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(folded.std, torch.ones(3).double(), rtol=1e-12, atol=0)
    for name in ("skewness", "excess_kurtosis", "correlation"):  # shifts and scales do not change the shape
        torch.testing.assert_close(getattr(folded, name), getattr(statistics, name), rtol=1e-9, atol=1e-9)


def test_folding_twice_is_folding_once(pixels, relative_error):
    vae = make_vae()
    statistics = statistics_of(vae, pixels)
    fold_statistics(vae, statistics.mean, statistics.std)
    weight = vae.quant_conv.weight.clone()
    statistics = statistics_of(vae, pixels)
    fold_statistics(vae, statistics.mean, statistics.std)
    assert relative_error(vae.quant_conv.weight, weight) < 1e-12


def test_float32_weights_stay_what_they_are(pixels, relative_error):
    vae = make_vae(torch.float32)
    weight, pixels = vae.quant_conv.weight, pixels.float()
    statistics, picture = statistics_of(vae, pixels), vae.decode(vae.encode(pixels))
    fold_statistics(vae, statistics.mean, statistics.std)
    assert vae.quant_conv.weight is weight
    assert weight.dtype == torch.float32
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(vae.decode(vae.encode(pixels)), picture) < 1e-5


def test_diffusers_sees_the_same(pixels, tmp_path, relative_error):
    vae = make_vae(torch.float32)
    statistics = statistics_of(vae, pixels.float())
    fold_statistics(vae, statistics.mean, statistics.std)
    vae.save_pretrained(tmp_path)
    theirs = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert theirs.config.scaling_factor == 1.0
    assert theirs.config.shift_factor is None
    with torch.no_grad():
        found = theirs.encode(pixels.float()).latent_dist
        assert relative_error(found.mode() * theirs.config.scaling_factor, vae.encode(pixels.float())) < 1e-5
        assert relative_error(found.std, vae.latent_posterior(pixels.float()).std) < 1e-5


@pytest.mark.parametrize("quant_convs", [(False, False), (True, False), (False, True)])
def test_without_quant_convs_one_scale_for_all_channels(pixels, quant_convs, relative_error):
    vae = make_vae(quant_convs=quant_convs)
    weights, picture = {**vae.state_dict()}, vae.decode(vae.encode(pixels))
    statistics = statistics_of(vae, pixels)
    fold_statistics(vae, statistics.mean, statistics.std)
    assert vae.config.scale_factor == pytest.approx(float(statistics.std.square().mean()) ** -0.5)
    assert vae.config.shift_factor == 0.0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vae.state_dict().items())
    assert relative_error(vae.decode(vae.encode(pixels)), picture) < 1e-12
    latents = LatentStatistics(3)
    latents.add(vae.latent_posterior(pixels))
    assert float(latents.std.square().mean()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0, 0.0], [1.0, 1.0, 1.0], "mean is"),
        ([0.0, 0.0, math.nan], [1.0, 1.0, 1.0], "mean is"),
        ([0.0, 0.0, 0.0], [1.0, 1.0, math.inf], "std is"),
        ([0.0, 0.0, 0.0], [1.0, 0.0, 1.0], "a constant channel"),
    ],
)
def test_wrong_values_change_nothing(mean, std, message):
    vae = make_vae()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    with pytest.raises(VAEError, match=message):
        fold_statistics(vae, torch.tensor(mean), torch.tensor(std))
    assert vae.config == SMALL
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
