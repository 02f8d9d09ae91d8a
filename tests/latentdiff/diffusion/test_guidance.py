"""Guidance against its definition and against diffusers."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from latentdiff import LatentDiffError, Schedule
from latentdiff.diffusion.guidance import guide, within
from latentdiff.diffusion.process import from_x0, to_x0

COND, UNCOND = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
X = torch.zeros(3, 4, 8, 8, dtype=torch.float64)


def pair(x, t):
    return COND, UNCOND


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 5.0])
def test_definition(scale):
    expected = scale * COND + (1 - scale) * UNCOND
    torch.testing.assert_close(guide(pair, scale)(X, 0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("amount", [0.0, 0.7, 1.0])
def test_rescale_is_diffusers(amount):
    plain = guide(pair, 5.0)(X, 0)
    expected = rescale_noise_cfg(plain, COND, amount)
    torch.testing.assert_close(guide(pair, 5.0, rescale=amount)(X, 0), expected, rtol=1e-12, atol=1e-12)


def test_guidance_is_the_same_in_every_space():
    """Its weights sum to one, so eps, x0 and v give the same images."""
    schedule = Schedule.named()
    t = torch.tensor([1, 500, 998])
    in_x0 = guide(pair, 5.0)(X, 0)
    for prediction in ("eps", "v", "mean"):
        outputs = tuple(from_x0(x0, X + 0.3, t, prediction, schedule) for x0 in (COND, UNCOND))
        guided = guide(lambda x, t, outputs=outputs: outputs, 5.0)(X, 0)
        torch.testing.assert_close(to_x0(guided, X + 0.3, t, prediction, schedule), in_x0, rtol=1e-8, atol=1e-8)


def test_interval_of_noise_levels():
    schedule = Schedule.named(zero_terminal_snr=True)
    model = within(lambda x, t: "inside", lambda x, t: "outside", 0.3, 5.0, schedule)
    for t in range(1000):
        level = float(schedule.sigma[t] / schedule.alpha[t]) if t < 999 else float("inf")
        assert model(X, t) == ("inside" if 0.3 < level <= 5.0 else "outside")


def test_ends_of_the_interval():
    """The upper end is inclusive and the lower exclusive, as in the paper."""
    schedule = Schedule.named()
    level = (schedule.sigma / schedule.alpha).tolist()
    model = within(lambda x, t: "inside", lambda x, t: "outside", level[100], level[200], schedule)
    assert [model(X, t) for t in (100, 101, 200, 201)] == ["outside", "inside", "inside", "outside"]


def test_outside_the_interval_the_pair_is_not_called():
    calls = []

    def counted(x, t):
        calls.append(t)
        return COND, UNCOND

    model = within(guide(counted, 5.0), lambda x, t: COND, 0.3, 5.0, Schedule.named())
    assert torch.equal(model(X, 0), COND)
    assert not calls
    model(X, 500)
    assert calls == [500]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: guide(pair, float("nan")), "guidance_scale=nan: expected a finite number; 1 disables guidance"),
        (lambda: guide(pair, float("inf")), "guidance_scale=inf"),
        (lambda: guide(pair, 5.0, rescale=1.5), r"rescale=1\.5: expected a number from 0 to 1"),
        (lambda: within(pair, pair, 2.0, 1.0, Schedule.named()), r"guidance interval \(2\.0, 1\.0\)"),
        (lambda: within(pair, pair, -1.0, 1.0, Schedule.named()), "guidance interval"),
        (lambda: within(pair, pair, float("nan"), 1.0, Schedule.named()), "guidance interval"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(LatentDiffError, match=message):
        call()
