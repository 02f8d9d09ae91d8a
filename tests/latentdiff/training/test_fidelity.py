"""How many samples show what was asked for, within a share of the time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from equality import same

from latentdiff.errors import LatentDiffError
from latentdiff.sampling.prompts import literal, parse
from latentdiff.training.budget import OutOfTime
from latentdiff.training.fidelity import SHARE, TOGETHER, Fidelity

LATENTS = np.random.default_rng(0).standard_normal((40, 2, 3, 3)).astype(np.float32)
CAPTIONS = [f"thing (no. {number % 20}: 2)" for number in range(40)]  # two pictures each


class Clock:
    """Shows the time that it is told."""

    now = 0.0

    def elapsed(self):
        return self.now


@pytest.fixture
def fidelity():
    said = []
    config = SimpleNamespace(seed=0, train_latent=SimpleNamespace(evaluate_every=100))
    run = SimpleNamespace(clock=Clock(), config=config, report=said.append, said=said,
                          accelerator=SimpleNamespace(num_processes=1))  # fmt: skip
    source = SimpleNamespace(all_captions=lambda: [[text] for text in CAPTIONS])
    cache = SimpleNamespace(good=np.arange(40) != 7, moments=lambda index, _: (LATENTS[index], None))
    return Fidelity(run, source, cache)


def picture_of(prompt):
    return next(index for index, text in enumerate(CAPTIONS) if literal(text) == prompt and index != 7)


def test_samples_beside_the_right_pictures_count(fidelity):
    """Every second sample lies beside another caption's picture; a picture that is broken is never asked for."""
    fidelity.run.clock.now = 1e6

    def sample(prompts, first):
        wanted = [picture_of(prompt) + (place % 2) for place, prompt in enumerate(prompts)]
        return torch.from_numpy(LATENTS[[index % 40 for index in wanted]]) + 0.01

    found = fidelity.measure(200, 1.0, sample)
    assert found == {"right_captions": 0.5, "right_captions_of": 20.0}
    assert [parse(prompt)[0] in CAPTIONS for prompt in fidelity.prompts] == [True] * len(fidelity.prompts)


def test_the_share_of_the_time_is_kept(fidelity):
    clock, taken = fidelity.run.clock, []

    def sample(prompts, first):
        clock.now += 2.0 * len(prompts)
        taken.append(2.0 * len(prompts))
        return torch.zeros(len(prompts), 2, 3, 3)

    for step in range(1, 400):
        clock.now += 10.0
        if fidelity.is_due(step):
            fidelity.measure(step, 2.0, sample)
            assert sum(taken) <= SHARE * clock.now
    assert len(taken) > 3
    fidelity.spent = clock.now  # as after a much slower one
    assert fidelity.measure(450, 2.0, sample) == {}
    fidelity.last, clock.now = 0, clock.now + 1
    assert fidelity.measure(500, 1e9, sample) == {}
    assert f"evaluation skipped, as {TOGETHER} samples take about" in fidelity.run.said[-1]


def test_a_validation_outlives_an_evaluation_that_runs_out_of_time(fidelity):
    def sample(prompts, first):
        raise OutOfTime

    fidelity.run.clock.now = 1e6
    assert fidelity.measure(200, 1.0, sample) == {}
    assert "no time is left in the budget" in fidelity.run.said[-1]


def test_one_caption_is_refused(fidelity):
    source = SimpleNamespace(all_captions=lambda: [["a thing"]] * 40)
    with pytest.raises(LatentDiffError, match="evaluate_every=100: needs pictures with different captions"):
        Fidelity(fidelity.run, source, SimpleNamespace())


def test_without_a_cache_it_is_refused(fidelity):
    with pytest.raises(LatentDiffError, match=r"evaluate_every=100: needs train_latent.cache=true"):
        Fidelity(fidelity.run, None, None)


@pytest.mark.slow
def test_a_training_is_the_same_with_it(train, uninterrupted, state):
    """To the bit."""
    settings = (f"vae.pretrained={uninterrupted('fp32')}", "train_latent.validate_every=2", "validation.num_steps=1")
    assert train("plain", *settings, stage="train_latent") == 0
    assert train("measured", *settings, "train_latent.evaluate_every=1", stage="train_latent") == 0
    assert same(state("plain")[1], state("measured")[1])
