"""Every formula of process.py and bound.py against an independent computation in float64."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from scipy.special import ndtr
from torch.distributions import Independent, Normal, kl_divergence

from latentdiff import LatentDiffError, Schedule
from latentdiff.diffusion.bound import bound_term, gaussian_kl, prior_term
from latentdiff.diffusion.process import (
    PREDICTIONS,
    Gaussian,
    Process,
    add_noise,
    check_prediction,
    check_weighting,
    convert,
    diffusion_loss,
    forward_kernel,
    forward_step,
    from_x0,
    loss_weight,
    network_output,
    posterior,
    reverse_step,
    reverse_variance,
    sample_timesteps,
    target,
    to_x0,
)
from latentdiff.diffusion.samplers import make_rows, sample

PLAIN = Schedule.named("linear", 100, beta_start=1e-3, beta_end=0.2)
ZERO = Schedule.named("scaled_linear", 100, zero_terminal_snr=True)
SCHEDULES = pytest.mark.parametrize(
    "schedule", [PLAIN, Schedule.named("cosine", 50), ZERO], ids=["plain", "cosine", "zero"]
)


def close(found, expected, rtol=1e-10):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-13)


def draw(batch: int = 6):
    return torch.randn(2, batch, 3, 4, dtype=torch.float64)


@SCHEDULES
def test_chain_of_steps_is_the_kernel(schedule):
    """q(x_t | x_{t-1}) applied t times has the mean and variance of q(x_t | x0), at every t."""
    x0 = torch.randn(1, 5, dtype=torch.float64)
    mean, var = x0, torch.zeros(1, 1, dtype=torch.float64)
    for t in range(schedule.num_timesteps):
        step = forward_step(mean, torch.tensor(t), schedule)
        shrink = forward_step(torch.ones(1, 1, dtype=torch.float64), torch.tensor(t), schedule).mean
        mean, var = step.mean, shrink.square() * var + step.var
        kernel = forward_kernel(x0, torch.tensor(t), schedule)
        close(kernel.mean, mean)
        close(kernel.var, var)


def test_chain_of_draws_has_the_kernels_moments():
    schedule = Schedule.named("linear", 20, beta_start=0.01, beta_end=0.3)
    count = 200_000
    x = torch.full((count, 1), 1.5, dtype=torch.float64)
    for t in range(20):
        step = forward_step(x, torch.tensor(t), schedule)
        x = step.mean + step.var.sqrt() * torch.randn_like(x)
    kernel = forward_kernel(torch.tensor([[1.5]], dtype=torch.float64), torch.tensor(19), schedule)
    deviation = float(kernel.var.sqrt())
    assert abs(float(x.mean() - kernel.mean)) < 4 * deviation / math.sqrt(count)
    assert abs(float(x.std()) / deviation - 1) < 4 / math.sqrt(2 * count)


def test_add_noise_is_the_kernels_draw_and_keeps_the_dtype():
    x0, noise = draw()
    t = torch.arange(6) * 19
    kernel = forward_kernel(x0, t, PLAIN)
    close(add_noise(x0, noise, t, PLAIN), kernel.mean + kernel.var.sqrt() * noise)
    assert add_noise(x0.bfloat16(), noise.bfloat16(), t, PLAIN).dtype == torch.bfloat16
    theirs = DDPMScheduler(100, 1e-3, 0.2, "linear").add_noise(x0.float(), noise.float(), t)
    torch.testing.assert_close(add_noise(x0.float(), noise.float(), t, PLAIN), theirs, rtol=1e-5, atol=1e-5)


def conditioned(x0: float, x_t: float, t: int, schedule: Schedule) -> tuple[float, float]:
    """Mean and variance of x_{t-1} given x_t and x0, by conditioning their joint Gaussian with a linear solve."""
    betas = schedule.betas.numpy()
    bar_prev, bar = np.prod(1 - betas[:t]), np.prod(1 - betas[: t + 1])
    link = math.sqrt(1 - betas[t])
    mean = np.array([math.sqrt(bar_prev), math.sqrt(bar)]) * x0
    covariance = np.array([[1 - bar_prev, link * (1 - bar_prev)], [link * (1 - bar_prev), 1 - bar]])
    gain = np.linalg.solve(covariance[1:, 1:], covariance[1:, :1]).item()
    return mean[0] + gain * (x_t - mean[1]), covariance[0, 0] - gain * covariance[1, 0]


@SCHEDULES
def test_posterior_is_bayes_rule(schedule):
    for t in {0, 1, 2, schedule.num_timesteps // 2, schedule.num_timesteps - 2, schedule.num_timesteps - 1}:
        for x0, x_t in ((0.7, -1.3), (-2.0, 0.4)):
            found = posterior(*torch.tensor([[[x0]], [[x_t]]], dtype=torch.float64), torch.tensor(t), schedule)
            mean, var = conditioned(x0, x_t, t, schedule)
            assert float(found.mean) == pytest.approx(mean, rel=1e-10, abs=1e-12)
            assert float(found.var) == pytest.approx(var, rel=1e-9, abs=1e-13)


@SCHEDULES
def test_posterior_ends(schedule):
    x0, x_t = draw(1)
    first = posterior(x0, x_t, torch.tensor(0), schedule)
    close(first.mean, x0)
    assert not first.var.any()
    last = posterior(x0, x_t, torch.tensor(schedule.num_timesteps - 1), schedule)
    if schedule.has_zero_terminal_snr:  # x_T carries no information, so the posterior is q(x_{T-1} | x0)
        kernel = forward_kernel(x0, torch.tensor(schedule.num_timesteps - 2), schedule)
        close(last.mean, kernel.mean)
        close(last.var, kernel.var)


@SCHEDULES
@pytest.mark.parametrize("source", PREDICTIONS)
def test_predictions_convert_into_each_other(schedule, source):
    x0, noise = draw()
    last = schedule.num_timesteps - 1
    ends_in_noise = source == "eps" and schedule.has_zero_terminal_snr
    t = torch.tensor([0, 1, 5, last // 2, last - 1, last - 1 if ends_in_noise else last])
    x_t = add_noise(x0, noise, t, schedule)
    output = target(x0, noise, t, source, schedule)
    torch.testing.assert_close(to_x0(output, x_t, t, source, schedule), x0, rtol=1e-8, atol=1e-8)
    for wanted in PREDICTIONS:
        expected = target(x0, noise, t, wanted, schedule)
        torch.testing.assert_close(convert(output, x_t, t, source, wanted, schedule), expected, rtol=1e-8, atol=1e-8)
        wrong = output + torch.randn_like(output)  # also for wrong predictions
        there = convert(wrong, x_t, t, source, wanted, schedule)
        if not (wanted == "eps" and schedule.has_zero_terminal_snr and int(t[-1]) == last):
            back = convert(there, x_t, t, wanted, source, schedule)
            torch.testing.assert_close(back, wrong, rtol=1e-7, atol=1e-7)


def test_targets_are_what_they_are_called():
    x0, noise = draw()
    t = torch.arange(6) * 19
    alpha, sigma = PLAIN.alpha[t].view(-1, 1, 1), PLAIN.sigma[t].view(-1, 1, 1)
    assert target(x0, noise, t, "eps", PLAIN) is noise
    assert target(x0, noise, t, "x0", PLAIN) is x0
    close(target(x0, noise, t, "v", PLAIN), alpha * noise - sigma * x0)
    close(target(x0, noise, t, "mean", PLAIN), posterior(x0, alpha * x0 + sigma * noise, t, PLAIN).mean)
    theirs = DDPMScheduler(100, 1e-3, 0.2, "linear").get_velocity(x0.float(), noise.float(), t)
    torch.testing.assert_close(target(x0, noise, t, "v", PLAIN).float(), theirs, rtol=1e-4, atol=1e-5)


def test_eps_is_refused_where_it_says_nothing():
    x0, noise = draw(2)
    last = torch.tensor([50, 99])
    with pytest.raises(
        LatentDiffError, match=r"prediction 'eps' does not work with zero terminal SNR: .* use 'v' or 'x0'"
    ):
        to_x0(noise, x0, last, "eps", ZERO)
    with pytest.raises(LatentDiffError, match="zero terminal SNR"):
        check_prediction("eps", ZERO)
    with pytest.raises(LatentDiffError, match="zero terminal SNR"):
        diffusion_loss(noise, x0, noise, last, "eps", ZERO)
    with pytest.raises(LatentDiffError, match="zero terminal SNR"):
        loss_weight(last, "eps", "min_snr", ZERO, x0)
    assert to_x0(noise, x0, torch.tensor([0, 98]), "eps", ZERO).isfinite().all()  # elsewhere it converts
    for prediction in ("v", "x0", "mean"):
        check_prediction(prediction, ZERO)
        assert to_x0(noise, x0, last, prediction, ZERO).isfinite().all()


@SCHEDULES
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_elbo_weight_is_the_same_number_under_every_prediction(schedule, variance):
    """It agrees with the bound itself: the term at a wrong x0 minus the term at the true one, per element."""
    x0, noise = draw()
    last = schedule.num_timesteps - 1
    t = torch.tensor([0, 1, 2, last // 2, last - 1, last - 1 if schedule.has_zero_terminal_snr else last])
    x_t = add_noise(x0, noise, t, schedule)
    x0_hat = x0 + 0.3 * torch.randn_like(x0)
    excess = bound_term(x0, x_t, x0_hat, t, variance, schedule) - bound_term(x0, x_t, x0, t, variance, schedule)
    allowed = [p for p in PREDICTIONS if not (p == "eps" and schedule.has_zero_terminal_snr)]
    for prediction in allowed:
        output = from_x0(x0_hat, x_t, t, prediction, schedule)
        options = {"weighting": "elbo", "variance": variance}
        loss = diffusion_loss(output, x0, noise, t, prediction, schedule, **options)
        torch.testing.assert_close(loss * x0[0].numel(), excess, rtol=1e-7, atol=1e-9)


@SCHEDULES
@pytest.mark.parametrize("weighting", ["elbo", "min_snr"])
def test_a_network_for_the_mean_is_asked_for_it_as_ct_xt_plus_c0_f(schedule, weighting):
    """With the coefficients solved for from two conditioned Gaussians; F's x0 and loss are those of the mean itself."""
    x0, noise = draw()
    last = schedule.num_timesteps - 1
    t = torch.tensor([0, 1, 2, last // 2, last - 1, last])
    x_t, f = add_noise(x0, noise, t, schedule), torch.randn_like(x0)
    c0, ct = (
        torch.tensor([conditioned(*given, int(s), schedule)[0] for s in t]).view(-1, 1, 1) for given in ((1, 0), (0, 1))
    )
    mean = ct * x_t + c0 * f
    process = Process(schedule, "mean")
    torch.testing.assert_close(process.x0(f, x_t, t), to_x0(mean, x_t, t, "mean", schedule), rtol=1e-7, atol=1e-7)
    step = reverse_step(mean, x_t, t, "mean", "beta", schedule)
    close(step.mean, mean)
    found = diffusion_loss(f, x0, noise, t, network_output("mean"), schedule, weighting=weighting)
    close(found, diffusion_loss(mean, x0, noise, t, "mean", schedule, weighting=weighting), rtol=1e-7)


def test_simple_is_refused_for_the_mean():
    """And the reason that the message gives is true: what x0 counts for falls below a millionth."""
    with pytest.raises(LatentDiffError, match=r"'simple' does not work with prediction 'mean': .* use 'elbo' or"):
        check_weighting("simple", "mean")
    for prediction, weighting in itertools.product(PREDICTIONS, ("elbo", "min_snr")):
        check_weighting(weighting, prediction)
    schedule = Schedule.named("scaled_linear")
    one = torch.ones(1, 1, dtype=torch.float64)
    c0 = posterior(one, 0 * one, torch.tensor(999), schedule).mean
    assert c0.square() < 1e-6


def test_exact_networks_sample_the_data_whatever_they_predict(mixture):
    """Ancestral sampling with one noise: the samples are the same for all predictions, and follow the mixture."""
    data, schedule = mixture([0.4, 0.6], [-1.0, 0.8], [0.3, 0.2]), Schedule.named("cosine", 200)
    start, *noise = torch.randn(201, 1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for process in (Process(schedule, prediction) for prediction in PREDICTIONS):

        def denoise(x, t, process=process):
            best, now = data.denoise(x, schedule.alpha[t], schedule.sigma[t]), torch.tensor(t)
            return process.x0(from_x0(best, x, now, network_output(process.prediction), schedule), x, now)

        *_, last = sample(denoise, start, make_rows("ddpm", schedule, 200), noise.__getitem__)
        found.append(last.x)
        torch.testing.assert_close(last.x, found[0], rtol=1e-7, atol=1e-7)
    truth = scipy.stats.kstest(found[0].flatten(), lambda x: 0.4 * ndtr((x + 1) / 0.3) + 0.6 * ndtr((x - 0.8) / 0.2))
    assert truth.statistic < 0.04


def test_elbo_weight_on_the_mean_is_one_over_two_variances():
    t = torch.arange(1, 100)
    like = torch.zeros(99, 1, dtype=torch.float64)
    for variance in ("beta", "posterior"):
        weight = loss_weight(t, "mean", "elbo", PLAIN, like, variance=variance)
        close(weight, 1 / (2 * reverse_variance(t, variance, PLAIN, like)))


def test_elbo_weight_on_eps_is_that_of_the_paper():
    """DDPM, equation 12: beta_t^2 / (2 var_t (1 - beta_t) (1 - alpha_bar_t))."""
    t = torch.arange(1, 100)
    betas, bar = PLAIN.betas[1:], PLAIN.betas.neg().add(1).cumprod(0)[1:]
    expected = betas**2 / (2 * betas * (1 - betas) * (1 - bar))
    close(loss_weight(t, "eps", "elbo", PLAIN, torch.zeros(99, dtype=torch.float64)), expected, rtol=1e-9)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_diffusers(gamma):
    """Three lines of diffusers' training script, one per prediction type; that for x0 is from the paper."""
    t = torch.arange(100)
    snr = compute_snr(DDPMScheduler(100, 1e-3, 0.2, "linear"), t).double()
    clipped = snr.clamp(max=gamma)
    like = torch.zeros(100, dtype=torch.float64)
    expected = {"eps": clipped / snr, "v": clipped / (snr + 1), "x0": clipped}
    for prediction, weight in expected.items():
        found = loss_weight(t, prediction, "min_snr", PLAIN, like, min_snr_gamma=gamma)
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-6)  # diffusers' tables are float32
    assert torch.equal(loss_weight(t, "v", "simple", PLAIN, like), torch.ones_like(like))


@pytest.mark.parametrize("prediction", ["v", "x0", "mean"])
@pytest.mark.parametrize("weighting", ["simple", "min_snr", "elbo"])
def test_nothing_divides_by_zero_under_zero_terminal_snr(prediction, weighting):
    weight = loss_weight(torch.arange(100), prediction, weighting, ZERO, torch.zeros(100, dtype=torch.float64))
    assert weight.isfinite().all()
    assert (weight >= 0).all()
    if weighting == "min_snr":
        assert weight[-1] == 0


def test_loss_is_the_weighted_mean_square():
    x0, noise = draw()
    t = torch.arange(6) * 19
    output = torch.randn_like(x0)
    error = (output - target(x0, noise, t, "v", PLAIN)).square().reshape(6, -1).mean(1)
    for gamma in (1.0, 5.0):
        found = diffusion_loss(output, x0, noise, t, "v", PLAIN, weighting="min_snr", min_snr_gamma=gamma)
        weight = loss_weight(t, "v", "min_snr", PLAIN, x0, min_snr_gamma=gamma).flatten()
        close(found, weight * error)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_inputs_are_computed_in_float32(prediction):
    x0, noise = (tensor.bfloat16() for tensor in draw())
    t = torch.arange(6) * 19
    output, x_t = torch.randn_like(x0), add_noise(x0, noise, t, PLAIN)
    assert x_t.dtype == torch.bfloat16
    for found in (
        target(x0, noise, t, prediction, PLAIN),
        to_x0(output, x_t, t, prediction, PLAIN),
        from_x0(x0, x_t, t, prediction, PLAIN),
        diffusion_loss(output, x0, noise, t, prediction, PLAIN),
    ):
        assert found.dtype == torch.float32
    exact = diffusion_loss(output.double(), x0.double(), noise.double(), t, prediction, PLAIN)
    torch.testing.assert_close(
        diffusion_loss(output, x0, noise, t, prediction, PLAIN).double(), exact, rtol=1e-5, atol=1e-6
    )


def test_compiles_without_graph_break():
    """Values are read only outside compiled functions."""

    @torch.compile(fullgraph=True, backend="eager")
    def step(x0, noise, output, t):
        x_t = add_noise(x0, noise, t, PLAIN)
        loss = diffusion_loss(output, x0, noise, t, "v", PLAIN, weighting="min_snr")
        return to_x0(output, x_t, t, "eps", PLAIN), loss

    x0, noise = draw()
    t = torch.arange(6)
    found = step(x0, noise, noise, t)
    close(found[0], to_x0(noise, add_noise(x0, noise, t, PLAIN), t, "eps", PLAIN))
    close(found[1], diffusion_loss(noise, x0, noise, t, "v", PLAIN, weighting="min_snr"))


def as_torch(gaussian: Gaussian) -> Independent:
    mean, var = torch.broadcast_tensors(gaussian.mean, gaussian.var)
    return Independent(Normal(mean, var.sqrt()), mean.dim() - 1)


def test_gaussian_kl():
    p, q = (Gaussian(torch.randn(3, 4, 5).double(), torch.rand(3, 1, 5).double() + 0.1) for _ in range(2))
    close(gaussian_kl(p, q), kl_divergence(as_torch(p), as_torch(q)))


@SCHEDULES
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_bound_terms_are_kl_and_log_density(schedule, variance):
    x0, noise = draw()
    last = schedule.num_timesteps - 1
    t = torch.tensor([0, 0, 1, 2, last // 2, last])
    x_t = add_noise(x0, noise, t, schedule)
    x0_hat = x0 + 0.1 * torch.randn_like(x0)
    found = bound_term(x0, x_t, x0_hat, t, variance, schedule)
    model = as_torch(reverse_step(x0_hat, x_t, t, "x0", variance, schedule))
    close(found[:2], -model.log_prob(x0)[:2])
    rest = slice(2, None)
    true = as_torch(posterior(x0[rest], x_t[rest], t[rest], schedule))
    model = as_torch(reverse_step(x0_hat[rest], x_t[rest], t[rest], "x0", variance, schedule))
    close(found[rest], kl_divergence(true, model), rtol=1e-9)
    assert found.isfinite().all()


def test_bound_term_has_finite_gradients():
    """At t = 0 the posterior's variance is 0; even a logarithm whose value is discarded would poison the gradient."""
    x0, noise = draw(2)
    t = torch.tensor([0, 5])
    x0_hat = x0.clone().requires_grad_()
    bound_term(x0, add_noise(x0, noise, t, PLAIN), x0_hat, t, "posterior", PLAIN).sum().backward()
    assert x0_hat.grad.isfinite().all()


@SCHEDULES
def test_prior_term(schedule):
    x0, _ = draw()
    kernel = forward_kernel(x0, torch.tensor(schedule.num_timesteps - 1), schedule)
    standard = Gaussian(torch.zeros_like(x0), torch.ones(1, dtype=torch.float64))
    close(prior_term(x0, schedule), kl_divergence(as_torch(kernel), as_torch(standard)))
    assert bool(prior_term(x0, schedule).any()) != schedule.has_zero_terminal_snr


def test_reverse_variances():
    t, like = torch.arange(100), torch.zeros(100, dtype=torch.float64)
    close(reverse_variance(t, "beta", PLAIN, like), PLAIN.betas)
    expected = torch.stack([torch.as_tensor(conditioned(0.0, 0.0, int(s), PLAIN)[1]) for s in t])
    expected[0] = PLAIN.betas[0]
    close(reverse_variance(t, "posterior", PLAIN, like), expected, rtol=1e-9)


def test_stratified_timesteps():
    generator = torch.Generator().manual_seed(0)
    for batch, T in itertools.product((1, 7, 64), (10, 1000)):
        t = sample_timesteps(batch, T, generator)
        assert t.dtype == torch.int64
        assert t.shape == (batch,)
        assert 0 <= t.min() <= t.max() < T
        edges = torch.arange(batch + 1) / batch * T
        for part, value in enumerate(t.sort().values):
            assert edges[part].floor() <= value <= edges[part + 1]
    draws = torch.stack([sample_timesteps(4, 20, generator) for _ in range(20_000)])
    for column in (*draws.T, draws.flatten()):  # every position of the batch sees every timestep equally often
        counts = column.bincount(minlength=20)
        assert (counts - len(column) / 20).abs().max() < 5 * math.sqrt(len(column) / 20)
    means, independent = draws.double().mean(1), sample_timesteps(80_000, 20, generator, stratified=False)
    assert means.var() < 0.1 * independent.view(-1, 4).double().mean(1).var()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t: to_x0(x, x, t, "epsilon", PLAIN), "unknown prediction 'epsilon': choose one of eps, x0, v, mean"),
        (lambda x, t: from_x0(x, x, t, "velocity", PLAIN), "unknown prediction 'velocity'"),
        (lambda x, t: target(x, x, t, "e", PLAIN), "unknown prediction 'e'"),
        (
            lambda x, t: loss_weight(t, "v", "min-snr", PLAIN, x),
            "unknown weighting 'min-snr': .* did you mean 'min_snr'",
        ),
        (lambda x, t: loss_weight(t, "v", "min_snr", PLAIN, x, min_snr_gamma=0), "min_snr_gamma=0"),
        (lambda x, t: reverse_variance(t, "fixed", PLAIN, x), "unknown reverse variance 'fixed'"),
        (lambda x, t: add_noise(x, x, t + 100, PLAIN), "out of range; the timesteps are 0 to 99"),
        (lambda x, t: add_noise(x, x[:1], t, PLAIN), r"noise has shape \(1, 3\) and x0 \(2, 3\); expected the same"),
        (lambda x, t: add_noise(x.byte(), x, t, PLAIN), r"x0 is torch\.uint8; expected floating point"),
        (lambda x, t: diffusion_loss(x[:, :1], x, x, t, "v", PLAIN), r"output has shape \(2, 1\)"),
        (lambda x, t: diffusion_loss(x, x, x[:1], t, "v", PLAIN), r"noise has shape \(1, 3\)"),
        (lambda x, t: to_x0(x[:, :1], x, t, "v", PLAIN), r"output has shape \(2, 1\)"),
        (lambda x, t: sample_timesteps(3, 0), "num_timesteps=0: both must be at least 1"),
        (lambda x, t: sample_timesteps(0, 10), "batch_size=0"),
        (lambda x, t: posterior(x, x, t.float(), PLAIN), r"t is torch\.float32; expected int64"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(LatentDiffError, match=message):
        call(torch.zeros(2, 3), torch.tensor([0, 1]))
