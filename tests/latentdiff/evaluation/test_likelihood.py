"""The bound on log p(picture): exact cases in closed form and by quadrature, honest errors, real models."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffError, LatentPipeline, Schedule
from latentdiff.config import load_config
from latentdiff.diffusion.process import Process
from latentdiff.evaluation.evidence import evidence
from latentdiff.evaluation.likelihood import (
    LatentBound,
    decoder_log_prob,
    discretized_log_prob,
    encode,
    log_likelihood,
    png_nats,
)
from latentdiff.evaluation.proposal import Proposal, Proposals, grid
from text_encoder import TextEncoder, train_tokenizer
from unet import UNet
from vae import VAE, DiagonalGaussian


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


def best_guess(x_t, t, schedule, variances):
    """E[x0 | x_t] for normal x0 with mean 0."""
    alpha, sigma = schedule.at(t, x_t)
    return alpha * variances * x_t / (alpha**2 * variances + sigma**2)


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
            return best_guess(x, t, self.model.process.schedule, variances)

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
            return best_guess(x, t, linear.process.schedule, variances)

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
