"""The four families: their probabilities sum to one, find a known truth, and a seed gives one table."""

import functools
import importlib.util
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from latentdiff import Schedule
from latentdiff.evaluation.likelihood import discretized_log_prob

FOLDER = Path(__file__).parents[2] / "examples" / "four_families"
sys.path.insert(0, str(FOLDER))

import adversarial  # noqa: E402
import autoregressive  # noqa: E402
import denoising  # noqa: E402
import measures  # noqa: E402
import measuring  # noqa: E402
import pictures  # noqa: E402
import training  # noqa: E402
import variational  # noqa: E402

LEVELS = torch.arange(256)


def test_autoregressive_probabilities_sum_to_one_and_see_no_future():
    model = autoregressive.Autoregressive(pixels=3, channels=2, levels=3, width=16, layers=2, heads=2)
    every = torch.tensor(list(itertools.product(range(3), repeat=6))).view(-1, 3, 2)
    log_p = model.log_probs(every).detach().double()
    assert log_p.sum((1, 2)).exp().sum().item() == pytest.approx(1, abs=1e-5)
    flat = log_p.flatten(1)
    for place in range(6):  # the same past and present, whatever follows
        key = every.flatten(1)[:, : place + 1]
        groups = [flat[(key == row).all(1), place] for row in key.unique(dim=0)]
        assert max(float(group.max() - group.min()) for group in groups) < 1e-5


def test_values_are_drawn_by_their_probabilities():
    """With the cache, and against the probabilities that are computed without it."""
    model = autoregressive.Autoregressive(pixels=2, channels=2, levels=2, width=16, layers=2, heads=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    every = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, 2, 2)
    expected = model.log_probs(every).sum((1, 2)).exp().detach().double()
    drawn = model.draw_sequences(20_000, torch.Generator().manual_seed(0)).flatten(1)
    counts = (drawn * torch.tensor([8, 4, 2, 1])).sum(1).bincount(minlength=16)
    assert scipy.stats.chisquare(counts, expected / expected.sum() * 20_000).pvalue > 1e-3


@pytest.mark.parametrize("mean", [-3.0, -1.0, 0.003, 0.98])
@pytest.mark.parametrize("log_scale", [-8.0, -3.0, 1.0])
def test_discretized_likelihoods_sum_to_one(mean, log_scale):
    center, scale = (torch.full((256,), value, dtype=torch.float64) for value in (mean, log_scale))
    logistic = variational.discretized_logistic(LEVELS, center, scale)
    assert logistic.exp().sum().item() == pytest.approx(1, abs=1e-9)
    value = 100 / 127.5 - 1
    inside = scipy.stats.logistic(mean, math.exp(log_scale))
    expected = inside.cdf(value + 1 / 255) - inside.cdf(value - 1 / 255)
    assert logistic[100].exp().item() == pytest.approx(expected, rel=1e-4, abs=1e-14)
    normal = discretized_log_prob(LEVELS[:, None], center[:, None], "normal", 2 * log_scale)
    assert normal.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_discretized_logistic_has_finite_gradients():
    center, scale = torch.zeros(256, requires_grad=True), torch.full((256,), -6.0, requires_grad=True)
    variational.discretized_logistic(LEVELS, center, scale).sum().backward()
    assert center.grad.isfinite().all()
    assert scale.grad.isfinite().all()


def test_measures_of_known_points():
    """The Fréchet distance of shifted points is the shift's; half of the data covered is a coverage of a half."""
    real = torch.randn(400, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert measures.frechet_distance(real, real + torch.tensor([3.0, 0, 4])) == pytest.approx(25, rel=1e-6)
    spread = float(real.T.cov().trace() + real.mean(0).square().sum())  # (2 s)^2 + s^2 - 2 (2 s) s = s^2
    assert measures.frechet_distance(real, 2 * real) == pytest.approx(spread, rel=1e-6)
    assert measures.precision_recall_coverage(real, real) == (1, 1, 1)
    both = torch.cat([real[:200], real[200:] + 100])
    precision, recall, coverage = measures.precision_recall_coverage(both, real[:200] + 1e-9)
    assert precision == 1
    assert recall == pytest.approx(0.5, abs=0.01)
    assert coverage == pytest.approx(0.5, abs=0.01)
    assert measures.precision_recall_coverage(real, real + 100) == (0, 0, 0)


def test_penalty_on_the_discriminators_slope():
    """For a linear discriminator it is known: R1_WEIGHT / 2 times the squared norm of the weights, every so often."""
    model = adversarial.Adversarial(latent=4)
    model.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(768, 1))
    levels = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in (1, adversarial.R1_EVERY):
        torch.manual_seed(0)
        losses.append(model.discriminator_loss(levels, step).item())
    expected = adversarial.R1_EVERY * adversarial.R1_WEIGHT / 2 * model.discriminator[1].weight.square().sum().item()
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-4)


def load_main():
    spec = importlib.util.spec_from_file_location("four_families", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("names", [("VAE",), tuple(training.RECIPES)])
def test_one_seed_gives_one_table_and_nothing_is_done_twice(names, tmp_path, monkeypatch):
    main, some = load_main(), torch.randint(256, (166, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    data = some.repeat_interleave(4, 2).repeat_interleave(4, 3)
    small = {"autoregressive": functools.partial(autoregressive.Autoregressive, width=16, layers=1, heads=1),
             "VAE": functools.partial(variational.Variational, latent=4),
             "GAN": functools.partial(adversarial.Adversarial, latent=4),
             "diffusion": functools.partial(denoising.Diffusion, schedule=Schedule.named("cosine", 25))}  # fmt: skip
    monkeypatch.setattr(denoising, "NETWORK", replace(denoising.NETWORK, block_out_channels=(8, 16)))
    for name, recipe in list(training.RECIPES.items()):
        monkeypatch.setitem(training.RECIPES, name, recipe._replace(model=small[name], steps=20, batch=4))
        if name not in names:
            monkeypatch.delitem(training.RECIPES, name)
    monkeypatch.setattr(measuring, "SEEDS", 2)
    monkeypatch.setattr(measuring, "DRAWS", 70)
    monkeypatch.setattr(measuring, "FEW", 20)
    monkeypatch.setattr(main, "load", lambda: pictures.Pictures(data[:150], data[150:]))
    tables, threads = [], torch.get_num_threads()
    try:
        for name, seed in (("a", "1"), ("b", "1"), ("a", "1"), ("c", "2")):
            before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.safetensors")}
            monkeypatch.setattr(sys, "argv", ["four_families", "--output", str(tmp_path / name), "--seed", seed])
            main.main()
            tables.append((tmp_path / name / "table-without-times.md").read_text())
            if name == "a":
                assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    finally:
        torch.set_num_threads(threads)
    assert tables[0] == tables[1] == tables[2] != tables[3]
    assert (tmp_path / "a" / "four_families.png").read_bytes() == (tmp_path / "b" / "four_families.png").read_bytes()
    assert "nan" not in tables[0]


def test_the_diffusion_network_begins_with_mean_and_spread():
    """With a UNet that returns zero it is the best denoiser of independent normal values."""
    model, generator = denoising.Diffusion(), torch.Generator().manual_seed(0)
    nn.init.zeros_(model.network.unet.conv_out.weight)
    mean, spread = torch.rand(2, 3, 16, 16, generator=generator) * 0.2 + 0.1
    pixels = torch.randn(2000, 3, 16, 16, generator=generator)
    pixels = mean + spread * (pixels - pixels.mean(0)) / pixels.std(0)
    model.network.measure(pixels)
    for t in (0, 100, 249):
        alpha, sigma = (float(each[t]) for each in (model.process.schedule.alpha, model.process.schedule.sigma))
        x_t = torch.randn(5, 3, 16, 16, generator=generator) * 0.1
        weight = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        expected = mean + weight * (x_t - alpha * mean)
        with torch.no_grad():
            assert (model.denoise(x_t, t) - expected.clamp(-1, 1)).abs().max() < 1e-4


# --- where the truth is known: the mixture of examples/one_dimension.py, shrunk to [-1, 1] and rounded to levels ---

PARTS = [(0.3, -1.3, 0.13), (0.45, 0.05, 0.28), (0.25, 1.4, 0.18)]  # weight, mean, standard deviation
SHRUNK = 2.5


def mass() -> torch.Tensor:
    """The probability of each level, float64, (256,)."""
    edges = SHRUNK * torch.cat([torch.tensor([-math.inf]), (LEVELS[1:] - 0.5) / 127.5 - 1, torch.tensor([math.inf])])
    return sum(w * torch.special.ndtr((edges.double() - m) / s) for w, m, s in PARTS).diff()


def learn(model, data, steps, learning_rate, batch=512):
    p = mass()
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        loss = model.loss(data(torch.multinomial(p, batch, replacement=True)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.requires_grad_(False)


def above_the_truth(log_p: torch.Tensor) -> float:
    """KL divergence from the truth in nats, over all levels: what -log p is above its best mean value."""
    p = mass()
    return float((p * (p.log() - log_p.double())).nan_to_num().sum())


def mlp(inputs, outputs, width=64):
    layers = [nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Linear(width, outputs))


@pytest.mark.slow
def test_the_autoregressive_model_finds_the_truth():
    """A level is eight bits, from the highest down."""
    torch.manual_seed(0)

    def bits(levels):
        return (levels[:, None] >> torch.arange(7, -1, -1) & 1)[..., None]

    model = autoregressive.Autoregressive(pixels=8, channels=1, levels=2, width=64, layers=2, heads=2)
    learn(model, bits, 1500, 3e-3)
    found = above_the_truth(model.log_prob(bits(LEVELS)))
    assert 0 <= found < 0.02


@pytest.mark.slow
def test_iwae_comes_near_the_truth():
    torch.manual_seed(0)
    model = variational.Variational(2, (mlp(1, 4), mlp(2, 2)))
    with torch.no_grad():
        model.decoder[-1].bias[1] = -3  # a decoder that begins narrow needs z; a wide one learns to do without
    learn(model, lambda levels: levels[:, None], 6000, 6e-3)
    generator = torch.Generator().manual_seed(0)
    runs = [model.log_prob(LEVELS[:, None], generator, 512) for _ in range(8)]
    elbo, iwae = (above_the_truth(torch.stack(each).mean(0)) for each in zip(*runs, strict=True))
    assert -0.005 < iwae < 0.05
    assert iwae < elbo


class Levels(nn.Module):
    """v from x_t and how much signal and noise is in it; an MLP half as wide ends 0.06 nats above the truth."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.layers = schedule, mlp(4, 1, width=128)

    def forward(self, x, t):
        alpha, sigma = self.schedule.at(t, x)
        known = (alpha, sigma, (alpha / sigma).log() / 4)
        return self.layers(torch.cat([2 * SHRUNK * x, *(each.expand_as(x) for each in known)], 1))


@pytest.mark.slow
def test_diffusions_bound_comes_near_the_truth(monkeypatch):
    torch.manual_seed(0)
    schedule = Schedule.named("cosine", 1000)
    model = denoising.Diffusion(Levels(schedule), schedule, "elbo")
    learn(model, lambda levels: levels[:, None], 5000, 5e-3, batch=1024)
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(20))  # expectations over normal noise
    noise = nodes.float().repeat_interleave(len(LEVELS))[:, None]
    monkeypatch.setattr(torch, "randn", lambda shape, generator: noise)
    bound = model.log_prob(LEVELS.repeat(len(nodes))[:, None], torch.Generator(), every=1).view(len(nodes), -1)
    found = above_the_truth(weights / weights.sum() @ bound.double())
    assert 0.014 < found < 0.03  # the former with an exact denoiser, as T is finite
