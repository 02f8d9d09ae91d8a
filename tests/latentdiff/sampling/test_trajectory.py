"""Sampling with a history of earlier steps: what is kept is what would be recomputed, and nothing mixes."""

import diffusers
import pytest
import torch

from latentdiff import LatentDiffError, Schedule
from latentdiff.sampling.inversion import invert_latents
from latentdiff.sampling.loop import CachedNetwork
from latentdiff.sampling.settings import SamplingSettings
from unet.trajectory import History

PROMPTS = ["a red apple", "a blue car on the road"]


@pytest.fixture
def with_history(new_pipe):
    """A pipeline whose UNet looks back four steps, as if trained."""
    pipe = new_pipe()
    pipe.unet.add_trajectory_attention(4)
    for name, parameter in pipe.unet.named_parameters():
        if "to_out" in name and "trajectory" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return pipe


def drawn(pipe, prompts, **settings):
    return list(pipe.stream(prompts, **{"num_steps": 7, "guidance_scale": 3, "seed": 0, **settings}))


def test_pictures_stay_the_same_to_the_bit_when_it_is_added(pipe, new_pipe, with_history):
    fresh = new_pipe()
    fresh.unet.add_trajectory_attention(4)
    expected = drawn(pipe, PROMPTS)[-1].x
    assert torch.equal(drawn(fresh, PROMPTS)[-1].x, expected)
    assert not torch.allclose(drawn(with_history, PROMPTS)[-1].x, expected, atol=1e-2)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_what_is_kept_is_what_would_be_recomputed(with_history, sampler):
    """Every prediction again, from all states so far, one guidance half at a time and without any cache."""
    pipe = with_history
    steps = drawn(pipe, "a red apple", sampler=sampler)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    states, times = [start, *(step.x for step in steps[:-1])], [step.t for step in steps]
    with torch.no_grad():
        for last, step in enumerate(steps):
            halves = []
            for text in ("a red apple", ""):
                history = History()
                for x, t in zip(states[: last + 1], times, strict=False):
                    output, history = pipe.unet(x, torch.tensor([t]), pipe.text_encoder([text]), history)
                halves.append(output)
            guided = halves[1] + 3 * (halves[0] - halves[1])
            x0 = pipe.process.x0(guided, states[last], torch.tensor(step.t))
            assert torch.allclose(step.x0, x0, atol=1e-5 * float(x0.abs().max())), last


def test_prompts_in_turn_and_together_do_not_mix(with_history):
    alone = [drawn(with_history, prompt, seed=seed)[-1].x for seed, prompt in enumerate(PROMPTS)]
    streams = [with_history.stream(prompt, num_steps=7, guidance_scale=3, seed=seed)
               for seed, prompt in enumerate(PROMPTS)]  # fmt: skip
    for pair in zip(*streams, strict=True):
        last = pair
    assert all(torch.equal(step.x, expected) for step, expected in zip(last, alone, strict=True))
    together = drawn(with_history, PROMPTS, seed=[0, 1])[-1].x
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_an_interval_of_guidance_interrupts_no_history(with_history):
    """Outside it the pictures of an interval are those without guidance, and inside they have all of their steps."""
    seen = []
    forward = with_history.unet.forward
    with_history.unet.forward = lambda x, t, context, history=None: (
        seen.append((len(x), len(history.steps))),
        forward(x, t, context, history),
    )[1]
    steps = drawn(with_history, "a red apple", guidance_interval=(0.3, 2.0))
    assert seen == [(2, min(number, 4)) for number in range(7)]
    expected = drawn(with_history, "a red apple", guidance_scale=1)
    assert torch.allclose(steps[0].x, expected[0].x, atol=1e-5)
    assert not torch.allclose(steps[-1].x, expected[-1].x, atol=1e-3)


def test_scheduler_objects_take_one_evaluation_a_step(with_history):
    """diffusers' DDIM draws what ours draws; those that evaluate twice in a step, always or once, are refused."""
    ddim = diffusers.DDIMScheduler.from_config(with_history.scheduler_config)
    ours, theirs = (
        drawn(with_history, "a red apple", sampler=sampler, num_steps=10)[-1].x for sampler in ("ddim", ddim)
    )
    assert torch.allclose(ours, theirs, atol=1e-3 * float(ours.abs().max()))
    with_history.process = with_history.process._replace(schedule=Schedule.named())  # which these two support
    config = with_history.scheduler_config
    for kind in (diffusers.HeunDiscreteScheduler, diffusers.PNDMScheduler):
        with pytest.raises(LatentDiffError, match=f"^{kind.__name__} evaluates the model more than once in a step"):
            drawn(with_history, "a red apple", sampler=kind.from_config(config))


def test_inversion_and_single_predictions_have_no_history(with_history, monkeypatch):
    """Inversion's earlier steps are cleaner, and an evaluation's calls are no trajectory."""
    forward, seen = with_history.unet.forward, []
    monkeypatch.setattr(with_history.unet, "forward", lambda *inputs: (seen.append(inputs[3:]), forward(*inputs))[1])
    settings = SamplingSettings(num_steps=3, guidance_scale=1, sampler="ddim")
    features = with_history.features(["a red apple"], settings)
    invert_latents(with_history.unet, with_history.process, features, settings, torch.randn(1, 4, 16, 16))
    CachedNetwork(with_history.network, features.cond, [500])(torch.randn(1, 4, 16, 16), 500)
    assert seen == [()] * 10
