"""Training with a history: it does not leak x0, it resumes bit for bit, and any number of processes trains the same."""

import math
from types import SimpleNamespace

import pytest
import torch
from equality import same
from torch import nn

from latentdiff import LatentDiffError, Schedule
from latentdiff.config import load_config
from latentdiff.data.batches import Chain
from latentdiff.diffusion.chain import noisier_timesteps
from latentdiff.diffusion.process import add_noise, diffusion_loss, from_x0, sample_timesteps
from latentdiff.training import history
from latentdiff.training.stages import new_unet
from unet.trajectory import Trace, TrajectoryAttention
from vae import VAE

SCHEDULE = Schedule.named("linear", 1000)
STEPS, BATCH, LENGTH, HELD_OUT = 350, 512, 2, 2**16


class Network(nn.Module):
    """A UNet's stand-in on pictures of one pixel: what is added to the exact v, seeing earlier steps."""

    def __init__(self):
        super().__init__()
        self.before = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64))
        self.attention = TrajectoryAttention(64, 2, LENGTH, 0)
        self.attention.to_out[0].reset_parameters()
        self.after = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))
        self.last = nn.Linear(64, 1)

    def forward(self, x, t, text, past):
        alpha, sigma = SCHEDULE.at(t, x)
        h = self.before(torch.cat([x, x / alpha.clamp(min=0.1), alpha, sigma, (alpha / sigma).log() / 4], 2))
        h = h + self.attention(h, trace := Trace(past))
        return self.last(h + self.after(h)), past.followed_by([trace.added[0]], LENGTH)


def exact_v(data, x, t):
    """The best prediction there is, E[v | x_t] (B, 1, 1)."""
    x0 = data.denoise(x[:, 0].double(), *SCHEDULE.at(t, x.double()))
    return from_x0(x0[:, None].to(x.dtype), x, t, "v", SCHEDULE)


def draw_chain(t):
    """Chains with the gaps of 10 steps, where the leak is learned most easily, for every second picture."""
    rows = torch.arange(0, len(t), 2)
    times = [noisier_timesteps(first, 10, LENGTH, 1000) for first in t[rows].tolist()]
    return Chain(rows, torch.tensor(times), torch.randn(len(rows), LENGTH, 1, 1))


def excess_of(network, data, x0, leaks, monkeypatch):
    """By how much the loss of a training step exceeds the exact denoiser's, for every picture with a history."""
    noise, t = torch.randn_like(x0), sample_timesteps(len(x0), 1000)
    chain, x_t = draw_chain(t), add_noise(x0, noise, t, SCHEDULE)

    def shared_noise(x_t, t, times, xi, schedule):
        for s in times.unbind(1):
            yield add_noise(x0[chain.rows], noise[chain.rows], s, schedule)

    with monkeypatch.context() as patch:
        if leaks:
            patch.setattr(history, "forward_chain", shared_noise)
        added = history.predict_after_chain(network, x_t, t, chain, [x0.new_zeros(len(x0))], SCHEDULE)
    exact = exact_v(data, x_t, t)
    loss, floor = (diffusion_loss(v, x0, noise, t, "v", SCHEDULE) for v in (exact + added, exact))
    return (loss - floor)[chain.rows]


def excess_after_training(data, leaks, monkeypatch):
    """The mean over held-out data, and its standard error."""
    network = Network()
    optimizer = torch.optim.Adam(network.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        excess_of(network, data, data.sample(BATCH).float()[:, None], leaks, monkeypatch).mean().backward()
        optimizer.step()
        rate.step()
    with torch.no_grad():
        found = excess_of(network, data, data.sample(HELD_OUT).float()[:, None], leaks, monkeypatch).double()
    return float(found.mean()), float(found.std()) / math.sqrt(len(found))


@pytest.mark.slow
def test_a_history_says_nothing_about_x0_that_the_state_does_not(mixture, monkeypatch):
    """The exact denoiser's loss is the floor, unless a history shares the noise of x_t: then the test would notice."""
    data = mixture([0.3, 0.45, 0.25], [-1.3, 0.05, 1.4], [0.13, 0.28, 0.18])
    mean, error = excess_after_training(data, False, monkeypatch)
    assert -3 * error < mean < 0.02
    mean, error = excess_after_training(data, True, monkeypatch)
    assert mean < -10 * error


LATENT = ("unet.trajectory_attention=3", "train_latent.batch_size=8", "train_latent.micro_batch_size=2",
          "train_latent.log_every=1")  # fmt: skip


@pytest.fixture
def settings(uninterrupted):
    """Of latent training with a history, under zero terminal SNR."""
    return [*LATENT, f"vae.pretrained={uninterrupted('fp32') / 'vae'}"]


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(train, state, log, said, settings):
    assert train("whole", *settings) == 0
    assert train("run", *settings, accident="kill at step", at=5) == -9
    assert train("run", *settings) == 0
    assert same(state("run")[1], state("whole")[1])
    assert log("run") == log("whole")
    names = [name for name in state("whole")[1] if name.startswith("model-ema/") and "trajectory" in name]
    assert len(names) == 8 * 4  # of 4 transformers
    assert train("odd", *settings, "train_latent.batch_size=6", "train_latent.micro_batch_size=3") == 1
    assert "so their number must be even, not 3; change train_latent.batch_size" in said("odd")


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}])
def test_two_processes_train_what_one_does(train, log, settings, environment):
    """The same chains for the same pictures, whole or with sharded weights; losses equal up to rounding."""
    assert train("one", *settings) == 0
    assert train("two", *settings, stage="train_latent", processes=2, environment=environment) == 0
    one, two = log("one"), log("two")
    assert set(one) == set(two) == set(range(1, 7))
    assert all(abs(one[step] - two[step]) < 1e-5 * abs(one[step]) for step in one)


def test_a_unet_without_gets_new_layers(uninterrupted, tmp_path):
    """And one that has them keeps them: its folder says so, and another number is refused."""
    model = uninterrupted("fp32") / "model"
    vae, encoder = VAE.from_pretrained(model / "vae"), SimpleNamespace(context_dim=32)

    def start(folder, *overrides):
        return new_unet(load_config("debug", [f"unet.pretrained={folder}", *overrides]), vae, encoder)

    before, added = start(model / "unet").state_dict(), start(model / "unet", LATENT[0])
    assert all(torch.equal(tensor, added.state_dict()[name]) for name, tensor in before.items())
    assert len(added.state_dict()) == len(before) + 8 * 4
    added.save_pretrained(tmp_path)
    for overrides in ([], LATENT[:1]):
        again = start(tmp_path, *overrides)
        assert again.config.trajectory_attention == 3
        assert same(again.state_dict(), added.state_dict())
    with pytest.raises(LatentDiffError, match=r"its trajectory_attention is 3, but .*=2; leave that out"):
        start(tmp_path, "unet.trajectory_attention=2")
