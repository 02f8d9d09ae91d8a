"""Schedules against plain Python and against diffusers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from latentdiff import LatentDiffError, Schedule
from latentdiff.diffusion.schedule import BETAS

NAMES = list(BETAS)
DIFFUSERS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def python_betas(name: str, T: int) -> list[float]:
    """The betas, computed with the standard library alone."""
    if name == "cosine":
        bar = [math.cos((s / T + 0.008) / 1.008 * math.pi / 2) ** 2 for s in range(T + 1)]
        return [min(1 - bar[s + 1] / bar[s], 0.999) for s in range(T)]
    first, last = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[name]
    if name == "linear":
        return [first + (last - first) * s / (T - 1) for s in range(T)]
    return [(math.sqrt(first) + (math.sqrt(last) - math.sqrt(first)) * s / (T - 1)) ** 2 for s in range(T)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [2, 100, 1000])
def test_closed_form(name, T):
    schedule = Schedule.named(name, T)
    betas = python_betas(name, T)
    torch.testing.assert_close(schedule.betas, torch.tensor(betas, dtype=torch.float64), rtol=1e-10, atol=0)
    bar = [math.prod(1 - beta for beta in betas[: t + 1]) for t in range(T)]
    expected = torch.tensor(bar, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha_bar, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.alpha, expected.sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.sigma, (1 - expected).sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.snr, expected / (1 - expected), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.log_snr, schedule.snr.log())
    assert schedule.num_timesteps == T
    assert not schedule.has_zero_terminal_snr


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_same_as_diffusers(name, zero):
    ours = Schedule.named(name, beta_start=None if name == "cosine" else 0.001, zero_terminal_snr=zero)
    ends = {"beta_start": 0.001, "beta_end": {"linear": 0.02, "scaled_linear": 0.012, "cosine": 0.02}[name]}
    theirs = DDPMScheduler(beta_schedule=DIFFUSERS[name], rescale_betas_zero_snr=zero, **ends)
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr(name):
    """alpha is shifted and scaled (arXiv 2305.08891): the first stays, the last is exactly zero."""
    plain, schedule = Schedule.named(name), Schedule.named(name, zero_terminal_snr=True)
    assert schedule.has_zero_terminal_snr
    assert schedule.alpha_bar[-1] == 0
    assert schedule.alpha[-1] == 0
    assert schedule.sigma[-1] == 1
    assert schedule.betas[-1] == 1
    first, last = plain.alpha[0], plain.alpha[-1]
    torch.testing.assert_close(schedule.alpha, (plain.alpha - last) * first / (first - last), rtol=1e-9, atol=1e-12)
    assert schedule.snr[-1] == 0
    assert schedule.log_snr[-1] == -math.inf
    assert not any(table.isnan().any() for table in (schedule.betas, schedule.snr, schedule.sigma_prev))


def test_one_step_earlier():
    schedule = Schedule.named("cosine", 10)
    assert schedule.alpha_prev[0] == 1
    assert schedule.sigma_prev[0] == 0
    assert torch.equal(schedule.alpha_prev[1:], schedule.alpha[:-1])
    assert torch.equal(schedule.sigma_prev[1:], schedule.sigma[:-1])


def test_first_noise_level_keeps_its_precision():
    """1 - cumprod would lose most digits of beta = 1e-12."""
    betas = torch.full((2,), 1e-12, dtype=torch.float64)
    torch.testing.assert_close(Schedule(betas).sigma[0] ** 2, betas[0], rtol=1e-14, atol=0)


def test_gather_broadcasts_and_keeps_precision():
    schedule = Schedule.named(num_timesteps=10)
    t = torch.tensor([0, 9])
    alpha, sigma = schedule.at(t, torch.zeros(2, 4, 8, 8))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert alpha.dtype == torch.float32
    assert schedule.at(t, torch.zeros(2, 4, dtype=torch.float64))[0].dtype == torch.float64
    assert schedule.at(t, torch.zeros(2, 4, dtype=torch.bfloat16))[0].dtype == torch.float32
    assert schedule.at(torch.tensor(3), torch.zeros(2, 4))[0].shape == (1, 1)


def test_values_follow_what_they_multiply():
    """Timesteps on the CPU work for latents on any device; timesteps elsewhere need the schedule to be there too."""
    schedule = Schedule.named(num_timesteps=10)
    assert schedule.at(torch.tensor(3), torch.zeros(2, 4, device="meta"))[0].device.type == "meta"
    with pytest.raises(LatentDiffError, match=r"t is on meta, but the schedule is on cpu: move it with schedule\.to"):
        schedule.at(torch.zeros(2, dtype=torch.int64, device="meta"), torch.zeros(2, 4, device="meta"))


def test_to_another_device_keeps_everything():
    schedule = Schedule.named(zero_terminal_snr=True)
    moved = schedule.to("meta")
    assert moved.alpha.device.type == moved.sigma_prev.device.type == "meta"
    assert moved.has_zero_terminal_snr
    assert schedule.alpha.device.type == "cpu"
    assert torch.equal(schedule.to("cpu").alpha, schedule.alpha)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([0, 10]), r"t=\[0, 10\] is out of range; the timesteps are 0 to 9"),
        (torch.tensor(-1), "t=-1 is out of range"),
        (torch.tensor([0.5, 1.0]), r"t is torch\.float32; expected int64"),
        (torch.tensor([1, 2, 3]), r"t has shape \(3,\); expected \(\) or \(2,\)"),
        (torch.tensor([[1, 2]]), r"t has shape \(1, 2\)"),
    ],
)
def test_wrong_timesteps(t, message):
    with pytest.raises(LatentDiffError, match=message):
        Schedule.named(num_timesteps=10).at(t, torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Schedule.named("scaled_liner"),
            r"unknown schedule 'scaled_liner': .*; did you mean 'scaled_linear'\?",
        ),
        (lambda: Schedule.named(num_timesteps=1), "num_timesteps=1"),
        (lambda: Schedule.named(num_timesteps=True), "num_timesteps=True"),
        (lambda: Schedule.named(num_timesteps=10.0), r"num_timesteps=10\.0"),
        (lambda: Schedule.named(beta_start=-0.1), r"beta_start=-0\.1"),
        (lambda: Schedule.named(beta_end=math.nan), "beta_end=nan"),
        (lambda: Schedule.named("cosine", beta_end=0.1), "beta_end is not a setting of the cosine schedule"),
        (lambda: Schedule.named(beta_start="0.1"), "beta_start='0.1'"),
        (lambda: Schedule([0.1, 0.2]), "betas are a list; expected a tensor"),
        (lambda: Schedule(torch.zeros(4)), "betas must lie in"),
        (lambda: Schedule(torch.tensor([0.1, math.nan])), "betas must lie in"),
        (lambda: Schedule(torch.tensor([1.0, 0.5])), "only the last may be 1"),
        (lambda: Schedule(torch.full((2, 2), 0.1)), r"betas have shape \(2, 2\)"),
    ],
)
def test_wrong_schedules(call, message):
    with pytest.raises(LatentDiffError, match=message):
        call()
