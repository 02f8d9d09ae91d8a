"""The bound on log p(picture): exact cases in closed form and by quadrature, honest errors, real models."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffError, LatentPipeline, Schedule
from latentdiff.config import load_config
from latentdiff.diffusion.bound import bound_term, prior_term
from latentdiff.diffusion.process import Process, add_noise, reverse_variance
from latentdiff.evaluation.evidence import evidence
from latentdiff.evaluation.likelihood import (
    Bound,
    LatentBound,
    decoder_log_prob,
    discretized_log_prob,
    encode,
    log_likelihood,
    png_nats,
)
from latentdiff.evaluation.oddness import oddness
from latentdiff.evaluation.proposal import UNIFORM, Proposal, Proposals, grid, stratified
from text_encoder import TextEncoder, train_tokenizer
from unet import UNet
from vae import VAE, DiagonalGaussian

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


@pytest.mark.parametrize("likelihood", ["laplace", "normal"])
@pytest.mark.parametrize("log_scale", [-8.0, -3.5, 0.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.2, 0.0031, 0.97, 1.5])
def test_the_levels_have_all_the_mass(likelihood, log_scale, mean):
    levels = torch.arange(256)[:, None]
    found = discretized_log_prob(levels, torch.full((256, 1), mean), likelihood, log_scale)
    assert found.isfinite().all()
    assert (found <= 0).all()
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_a_level_has_the_mass_of_what_rounds_to_it():
    """By quadrature of the density between the midpoints of the levels."""
    points = torch.linspace(-1, 1, 20001, dtype=torch.float64) / 255 + (100 / 127.5 - 1)
    for likelihood, density in (("laplace", lambda x: (-x.abs() / 0.05).exp() / 0.1),
                                ("normal", lambda x: (-(x**2) / 5e-3).exp() / math.sqrt(math.pi * 5e-3))):  # fmt: skip
        mass = torch.trapezoid(density(points - 0.03), points).item()
        scale = math.log(0.05) if likelihood == "laplace" else math.log(0.0025)
        found = discretized_log_prob(torch.tensor([[100]]), torch.tensor([[0.03]]), likelihood, scale)
        assert found.exp().item() == pytest.approx(mass, rel=1e-7)


class Linear:
    """A model whose every probability is known: z ~ N(0, variances), levels from a Laplace distribution around A z."""

    def __init__(self, schedule, variances, matrix, log_scale, width):
        self.process, self.device = Process(schedule, "x0"), torch.device("cpu")
        self.variances, self.matrix = variances, matrix
        weight = torch.zeros(1, dtype=torch.float64)
        self.unet = self.Network(self)
        self.unet.conv_in = SimpleNamespace(weight=weight)
        self.vae = SimpleNamespace(
            facts={"decoder_likelihood": "laplace", "decoder_log_scale": str(log_scale)},
            decoder=SimpleNamespace(conv_in=SimpleNamespace(weight=weight)),
            decode=lambda z: (z.flatten(1) @ matrix.T)[:, :, None, None],
            latent_posterior=lambda x: DiagonalGaussian(
                (x.flatten(1) @ torch.linalg.pinv(matrix).T)[:, :, None, None],
                torch.full((len(x), len(variances), 1, 1), 2 * math.log(width), dtype=torch.float64)),
        )  # fmt: skip

    class Network:
        def __init__(self, model):
            self.model = model

        def __call__(self, x, t, context):
            variances = self.model.variances[:, None, None]
            return gaussian_x0(x, t, self.model.process.schedule, variances)

    def text_encoder(self, prompts):
        return torch.zeros(len(prompts), 1, 1)

    def log_prob(self, levels, count=400):
        """The truth: the integral over z on a grid."""
        span = torch.linspace(-7, 7, count, dtype=torch.float64)
        z = torch.cartesian_prod(*(span * v.sqrt() for v in self.variances))
        log_prior = (-0.5 * z**2 / self.variances - 0.5 * (2 * math.pi * self.variances).log()).sum(1)
        repeated = levels.flatten().expand(len(z), -1)
        scale = float(self.vae.facts["decoder_log_scale"])
        log_joint = log_prior + discretized_log_prob(repeated, z @ self.matrix.T, "laplace", scale)
        cell = (self.variances.sqrt() * 14 / (count - 1)).log().sum()
        return float(log_joint.logsumexp(0) + cell)


@pytest.fixture
def linear():
    schedule = Schedule.named("linear", 200, beta_start=0.1 / 200, beta_end=20 / 200)
    matrix = torch.tensor([[0.3, 0.1], [-0.1, 0.25], [0.2, -0.2]], dtype=torch.float64)
    return Linear(schedule, torch.tensor([1.0, 0.5], dtype=torch.float64), matrix, math.log(0.1), 0.3)


LEVELS = torch.tensor([[140, 120, 160], [180, 90, 200], [60, 128, 90]], dtype=torch.uint8)[:, :, None, None]


def uniform(T):
    return Proposal(torch.full((T - 1,), 1 / (T - 1), dtype=torch.float64))


@pytest.fixture
def proposal(linear):
    """From other latents than those whose bound is estimated."""
    t, count = grid(200, 24), 64
    z = linear.variances.sqrt()[:, None, None] * torch.randn(count, 2, 1, 1, dtype=torch.float64)
    bound, context = LatentBound(linear), torch.zeros(count, 1, 1)
    terms = [bound.terms(z, torch.randn(count, 2, 1, 1), step.expand(count), context) for step in t]
    return Proposal.measured(t, torch.stack(terms), 200)


def test_the_whole_bound_is_below_the_truth_and_not_far(linear):
    """All timesteps, many draws: below log p(x) by quadrature over two latents, by a fraction of a nat here."""
    found = log_likelihood(linear, LEVELS, [""] * 3, uniform(200), draws=150, num_timesteps=None)
    for bound, levels in zip(found, LEVELS, strict=True):
        truth = linear.log_prob(levels)
        gap = truth - bound.nats
        assert -3 * bound.standard_error < gap < 1.5
        assert bound.nats == pytest.approx(bound.decoder + bound.entropy + bound.prior + bound.kl + bound.first)
        assert bound.bits_per_dimension == pytest.approx(-bound.nats / math.log(2) / 3)


@pytest.mark.slow
def test_few_timesteps_estimate_the_same(linear, proposal):
    """Sampled timesteps agree with all of them within the standard errors, which they widen."""
    exact = log_likelihood(linear, LEVELS, [""] * 3, uniform(200), draws=200, num_timesteps=None, seed=1)
    found = log_likelihood(linear, LEVELS, [""] * 3, proposal, draws=200, num_timesteps=6, seed=2)
    for one, other in zip(exact, found, strict=True):
        assert abs(one.nats - other.nats) < 4 * math.hypot(one.standard_error, other.standard_error)
        assert abs(one.kl - other.kl) < 4 * math.hypot(one.standard_error, other.standard_error)


@pytest.mark.slow
def test_intervals_cover(linear, proposal):
    """Of 300 estimates with 8 draws, the 90 % intervals hold the mean of many draws in 90 % of the cases."""
    truth = log_likelihood(linear, LEVELS[:1], [""], proposal, draws=3000, num_timesteps=3)[0]
    inside = 0
    for seed in range(1, 301):
        found = log_likelihood(linear, LEVELS[:1], [""], proposal, draws=8, num_timesteps=3, seed=seed)[0]
        inside += found.interval[0] <= truth.nats <= found.interval[1]
    assert 0.84 <= inside / 300 <= 0.96


def test_noise_does_not_depend_on_the_prompt(linear):
    one, other = (log_likelihood(linear, LEVELS, [prompt] * 3, uniform(200), seed=5) for prompt in ("a", "b"))
    assert [each.by_draw for each in one] == [each.by_draw for each in other]
    assert log_likelihood(linear, LEVELS, [""] * 3, uniform(200), seed=6)[0].by_draw != one[0].by_draw


@pytest.mark.slow
def test_a_wider_posterior_is_a_bound_too(linear):
    narrow, wide = (log_likelihood(linear, LEVELS, [""] * 3, uniform(200), draws=100, num_timesteps=None,
                                   posterior_floor=floor) for floor in (0.0, 0.4))  # fmt: skip
    for one, other, levels in zip(narrow, wide, LEVELS, strict=True):
        assert other.entropy - one.entropy == pytest.approx(2 * math.log(0.4 / 0.3))
        assert other.nats - 3 * other.standard_error < linear.log_prob(levels)


def test_without_the_decoders_spread_its_part_is_left_out(linear):
    linear.vae.facts = {}
    assert decoder_log_prob(linear, LEVELS, torch.zeros(3, 2, 1, 1)).isnan().all()
    (bound, *_) = log_likelihood(linear, LEVELS, [""] * 3, uniform(200))
    assert math.isnan(bound.decoder)
    assert bound.nats == pytest.approx(bound.entropy + bound.prior + bound.kl + bound.first)


def test_the_decoder_can_be_left_to_another_bound(linear):
    """It does not depend on the prompt, so a second prompt need not run it again."""
    (whole,) = log_likelihood(linear, LEVELS[:1], ["a"], uniform(200))
    (latents,) = log_likelihood(linear, LEVELS[:1], ["a"], uniform(200), decoder=False)
    assert math.isnan(latents.decoder)
    assert latents.nats + whole.decoder == pytest.approx(whole.nats, rel=1e-12)


def test_proposals():
    t = torch.tensor([1, 10, 99])
    proposal = Proposal.measured(t, torch.tensor([[100.0, 100], [10, 10], [1, 1]]), 100)
    assert proposal.probabilities.shape == (99,)
    assert proposal.probabilities.sum() == pytest.approx(1)
    measured = proposal.probabilities - UNIFORM / 99
    assert measured[0] / measured[9] == pytest.approx(10)
    assert measured.sum() == pytest.approx(1 - UNIFORM)
    times, weights = stratified(proposal, None, torch.Generator())
    assert times.tolist() == list(range(1, 100))
    assert weights.unique().tolist() == [1.0]
    generator, values = torch.Generator().manual_seed(0), 100 / torch.arange(1, 100).double()
    means = []
    for _ in range(2000):
        times, weights = stratified(proposal, 4, generator)
        means.append((weights * values[times - 1]).sum())
    means = torch.stack(means)
    assert abs(means.mean() - values.sum()) < 4 * means.std() / len(means) ** 0.5
    with pytest.raises(LatentDiffError, match="expected several from 1 to 99"):
        Proposal.measured(torch.tensor([0, 5]), torch.ones(2, 1), 100)


def test_intervals_hold_for_pictures_unlike_those_measured():
    """As the shipped model's: held-out pictures still have terms where those of training pictures have ended."""
    t, T = grid(1000, 24), torch.arange(1, 1000)
    proposal = Proposal.measured(t, 800 / t[:, None] ** 1.1 * torch.where(t < 128, 1, 0.05)[:, None], 1000)
    values, generator = 800 / T**1.1 + 0.8 * ((T > 128) & (T < 512)), torch.Generator().manual_seed(0)
    covered = []
    for _ in range(500):
        drawn = [stratified(proposal, 8, generator) for _ in range(8)]
        sums = tuple(float((weights * values[times - 1]).sum()) for times, weights in drawn)
        low, high = Bound(0, 0, 0, 0, 0, sums, 1, 0).interval
        covered.append(low <= values.sum() <= high)
    assert 0.86 <= np.mean(covered) <= 0.94


def test_numbers_out_of_range(linear):
    for wrong in ({"draws": 0}, {"num_timesteps": 0}, {"posterior_floor": -1}):
        with pytest.raises(LatentDiffError, match=next(iter(wrong))):
            log_likelihood(linear, LEVELS, [""] * 3, uniform(200), **wrong)


def test_what_a_png_takes():
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert png_nats(white) < 0.05 * png_nats(noise)
    assert png_nats(noise) / math.log(2) / noise.numel() == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("draws", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_captions_are_compared_with_the_same_noise(linear, proposal, monkeypatch, draws):
    """A model whose variances depend on the prompt: the difference of the exact log-densities of its latents."""
    scales = {"": 1.0, "narrow": 0.25, "wide": 4.0}
    monkeypatch.setattr(
        linear, "text_encoder", lambda texts: torch.tensor([scales[text] for text in texts])[:, None, None]
    )

    class Network:
        conv_in = linear.unet.conv_in

        def __call__(self, x, t, context):
            variances = linear.variances[:, None, None] * context.view(-1, 1, 1, 1)
            return gaussian_x0(x, t, linear.process.schedule, variances)

    linear.unet = Network()
    captions = [["narrow", "wide"]] * 3
    found = evidence(linear, LEVELS, captions, proposal, draws=draws, num_timesteps=None)
    posterior = encode(linear, LEVELS)
    for number, result in enumerate(found):
        for caption, nats, error in zip(result.captions, result.nats, result.standard_error, strict=True):
            square = posterior.mean[number].flatten().double() ** 2 + 0.09
            one, other = (-0.5 * (square / each + (2 * math.pi * each).log()).sum()
                          for each in (linear.variances * scales[caption], linear.variances))  # fmt: skip
            assert abs(nats - (one - other)) < 4 * error + 0.35  # the gaps of the two bounds differ
    assert found[0].best in ("narrow", "wide")


def test_a_pipeline_takes_pictures_of_any_kind(tmp_path):
    config = load_config("debug")
    encoder = TextEncoder.new(config.text_encoder.build(), train_tokenizer(["a"] * 2, vocab_size=60, max_length=16))
    pipe = LatentPipeline(vae=VAE(config.vae.build(32)), unet=UNet(config.unet.build(4, encoder.context_dim, 16)),
                          text_encoder=encoder, schedule=config.diffusion.build())  # fmt: skip
    image = Image.effect_noise((40, 48), 60).convert("RGB")
    image.save(tmp_path / "one.png")
    first, second = pipe.log_likelihood([image, tmp_path / "one.png"], ["a", "a"], draws=2, num_timesteps=2)
    assert first.dimensions == second.dimensions == 3 * 32 * 32
    assert first.entropy == second.entropy
    pipe.proposals = None
    (alone,) = pipe.log_likelihood(image, draws=1, num_timesteps=2)
    assert math.isnan(alone.standard_error)
    assert pipe.proposals.captions is None  # nothing was asked for, so nothing is known of captions, nor kept
    pipe.proposals.write(tmp_path)
    assert Proposals.read(tmp_path, 1000) is None
    assert len(pipe.match_captions(image, ["a", "a a", "b"]).nats) == 3
    assert pipe.proposals.captions is not None
    pipe.proposals.write(tmp_path)
    pipe.folder, pipe.proposals, kept = tmp_path, None, pipe.proposals
    pipe.log_likelihood(image, draws=1, num_timesteps=2)
    assert torch.allclose(pipe.proposals.captions.probabilities, kept.captions.probabilities)
    with pytest.raises(LatentDiffError, match="1 prompts for 2 images"):
        pipe.log_likelihood([image, image], ["a"])
    with pytest.raises(LatentDiffError, match="expected a list of them"):
        pipe.match_captions(image, "a")


def test_odd_pictures_are_found_on_either_side():
    """Dear and cheap ones of usual complexity, and a simple one that costs what it should; then white squares."""
    png = torch.randn(40, dtype=torch.float64).mul(0.4).exp()
    bits = 1.5 * png**0.6 * torch.randn(40, dtype=torch.float64).mul(0.03).exp()
    bits[3] *= 1.5
    bits[7] /= 1.5
    png[9], bits[9] = 0.02, 1.5 * 0.02**0.6
    found = oddness(bits, png)
    assert set(found.topk(3).indices.tolist()) == {3, 7, 9}
    assert (found > 5).sum() == 3
    assert (oddness(2 * bits, 3 * png) - found).abs().max() < 1e-9
    bits[36:], png[36:] = 0.4, 0.01
    assert oddness(bits, png)[36:].min() > oddness(bits, png)[10:36].max()
    with pytest.raises(LatentDiffError, match="expected above 0"):
        oddness(bits - 1, png)
    with pytest.raises(LatentDiffError, match="at least 8"):
        oddness(bits[:5], png[:5])
