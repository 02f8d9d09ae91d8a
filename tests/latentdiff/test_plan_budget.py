"""What a budget buys, against counts by hand and against what training decides."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.cli.training import plan as command
from latentdiff.config import load_config
from latentdiff.plan import plan
from latentdiff.plan.budget import count_pictures
from latentdiff.sections.values import duration
from latentdiff.training.budget import AIM, DISK_SPEED, LEAVING, OVERHEAD, PARTS, RESERVE, Pacer
from latentdiff.training.signals import StopReason
from latentdiff.training.timetable import Timetable
from vae import VAE

SLOW = {"device": "h100", "mfu": 1e-6}
HALF, SINGLE = 989e12 * 1e-6, 494e12 * 1e-6  # FLOP/s


def coder_flops(image_size: int = 32) -> tuple[int, int]:
    """FLOPs of the encoder and of the decoder of the recipe `debug`, by torch's own counter."""
    vae, found = VAE(load_config("debug").vae.build(image_size)), []
    pixels, z = torch.zeros(1, 3, image_size, image_size), torch.zeros(1, 4, image_size // 2, image_size // 2)
    for work in (lambda: vae.latent_posterior(pixels), lambda: vae.decode(z)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work()
        found.append(counter.get_total_flops())
    return found[0], found[1]


def test_a_budget_buys_what_a_count_by_hand_says():
    """Both stages, step by step, with every cost of theirs."""
    free, found = (plan(load_config("debug", settings), **SLOW, dataset_size=5000) for settings in ([], ["budget=1h"]))
    (recipe, *_), (vae, encode, latent, sample) = free.stages, found.stages
    late = vae.step_flops
    early = recipe.total_flops // 80 - late  # 10 of 20 steps of 8 pictures come before the discriminator
    assert early < 0.9 * late
    encoder, decoder = coder_flops()
    finishing = (2 * 5000 * encoder + 1000 * decoder) / SINGLE  # plain and mirrored; the error of 1,000 pictures

    # The VAE: 35 % of the time, 16 held-out pictures per validation; warm-up is 5 of the recipe's 20 steps.
    validation, checkpoint = 16 * vae.forward_flops / HALF, 16 * vae.trained / DISK_SPEED
    after = validation + 3 * checkpoint + finishing
    often = PARTS * (validation + checkpoint) / (0.35 * 3600)
    assert 0.001 < often < OVERHEAD
    time, steps, flops = AIM * 0.35 * 3600 - after, 0, 0
    while True:
        first = math.ceil(11 / 20 * (steps + 1))
        more = 8 * ((first - 1) * early + (steps + 1 - first + 1) * late)
        if more / HALF * (1 + often) > time:
            break
        steps, flops = steps + 1, more
    assert steps > 200
    bought = vae.purchase
    assert (bought.steps, vae.pictures, vae.total_flops) == (steps, 8 * steps, flops)
    assert bought.discriminator_start == math.ceil(11 / 20 * steps)
    assert bought.warmup_steps == round(steps / 4)
    assert bought.decay_start == steps - math.ceil(steps / 4) + 1
    assert bought.passes == pytest.approx(8 * steps / 5000)
    assert vae.seconds == pytest.approx(flops / HALF)

    # Latent training: what remains. The cache takes over what finishing the VAE has encoded. A validation measures 16
    # pictures in 4 bands three times and samples 2 prompts.
    begin = vae.seconds * (1 + often) + after
    assert bought.end == pytest.approx(begin)
    assert bought.end == pytest.approx(AIM * 0.35 * 3600, abs=8 * late / HALF * 1.1)
    assert encode.seconds == pytest.approx(2 * 5000 * encoder / SINGLE, rel=1e-3)
    validation = 16 * 4 * 3 * latent.forward_flops / HALF + 2 * sample.total_flops / HALF
    checkpoint = 16 * latent.trained / DISK_SPEED
    often = min(OVERHEAD, PARTS * (validation + checkpoint) / (3600 - begin))
    time = AIM * 3600 - begin - RESERVE * (validation + 3 * checkpoint) - LEAVING
    steps = int(time / (8 * latent.step_flops / HALF * (1 + often)))
    assert abs(latent.purchase.steps - steps) <= 1
    assert latent.purchase.discriminator_start is None
    assert found.seconds == latent.purchase.end < 3600


@pytest.mark.parametrize("snapshots", [0, 24])
def test_a_budget_buys_what_the_run_would_decide_at_that_speed(snapshots, monkeypatch):
    """The pacer of training, with a clock that shows the estimated times, decides on the same number of steps."""
    for module in ("plan", "training"):  # snapshots take 5 % of the time
        monkeypatch.setattr(f"latentdiff.{module}.budget.DISK_SPEED", 2e5)
    config = load_config("debug", ["budget=1h", "vae.pretrained=builtin:emoji-64", "train_latent.validate_first=true",
                                   f"train_latent.ema_snapshots={snapshots}"])  # fmt: skip
    _, latent, sample = (found := plan(config, **SLOW, dataset_size=900)).stages
    assert found.stages[0].name.startswith("encode 900")
    clock = SimpleNamespace(now=found.stages[0].seconds)
    run = SimpleNamespace(clock=SimpleNamespace(elapsed=lambda: clock.now), device=torch.device("cpu"), is_main=True,
                          accelerator=SimpleNamespace(num_processes=1), report=print, config=config,
                          budget=3600.0)  # fmt: skip
    timetable = Timetable(config.train_latent, "train_latent", has_budget=True)
    pacer = Pacer(run, timetable, SimpleNamespace(append=lambda decision: None), 3600.0, latent.checkpoint,
                  (snapshots, 8 * latent.trained))  # fmt: skip
    validation = 16 * 4 * 3 * latent.forward_flops / HALF + 2 * sample.seconds
    with pacer.timing(pacer.validation):
        clock.now += validation
    for step in itertools.count(1):
        clock.now += latent.seconds / latent.purchase.steps
        pacer.after(step, StopReason.NONE, lambda: (validation, 0.0))
        if timetable.decisions:
            break
    assert latent.purchase.steps > 1000
    assert abs(timetable.steps - latent.purchase.steps) <= 1
    assert abs(timetable.decisions[0].decay_start + 1 - latent.purchase.decay_start) <= 1


def test_max_steps_bound_a_budget_and_leave_the_time_to_the_next_stage():
    found = plan(load_config("debug", ["budget=1h", "train_vae.steps=24", "train_latent.steps=5"]), **SLOW)
    vae, latent = (stage.purchase for stage in found.stages if stage.purchase)
    assert (vae.steps, vae.warmup_steps, vae.discriminator_start) == (24, 6, 14)  # 11 / 20 of 24, rounded up
    assert latent.steps == 5
    assert latent.share == pytest.approx(1 - vae.end / 3600)
    assert latent.share > 0.9
    assert found.seconds == latent.end < 360
    text = "\n".join(found.lines())
    assert "estimate 5 (max_steps) of 8, " in text
    assert "too short" not in text


@pytest.mark.slow
def test_a_budget_that_is_too_short_is_said_in_words_with_one_that_suffices():
    config = load_config("debug", ["budget=30s", "budget_share=0.2"])
    found = plan(config, **SLOW, dataset_size=9000)  # encoding alone takes longer
    assert found.stages[2].purchase.seconds == found.stages[2].purchase.steps == 0
    lines = found.lines()
    assert sum("are too short: " in line and "at least 20 are needed; " in line for line in lines) == 2
    (verdict,) = (line for line in lines if line.startswith("estimate: budget="))
    assert verdict.startswith("estimate: budget=30s is too short; ")
    enough = duration(verdict.split()[-3])
    for budget, is_enough in ((enough, True), (0.95 * enough, False)):  # it is hardly more than it takes
        found = plan(config.model_copy(update={"budget": f"{budget:.0f}s"}), **SLOW, dataset_size=9000)
        bought = [stage.purchase for stage in found.stages if stage.purchase]
        assert all(purchase.steps >= 20 for purchase in bought) == is_enough
        assert ("too short" not in "\n".join(found.lines())) == is_enough


@pytest.mark.slow
def test_training_pictures_are_counted_without_opening_one_or_assumed(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "one.tar").write_bytes(b"")
    (tmp_path / "mine").mkdir()
    for name in map(str, range(60)):
        (tmp_path / "mine" / f"{name}.png").write_bytes(b"")  # no picture
        (tmp_path / "mine" / f"{name}.txt").write_text("a caption")

    def count(source: object) -> int | None:
        return count_pictures(load_config("debug", [f"data.source={source}"]))

    assert 50 <= (count(tmp_path / "mine") or 0) < 60  # some are held out
    assert [count(source) for source in (tmp_path / "shards", tmp_path / "none", "owner/name")] == [None, None, None]
    for source, number in (("builtin:emoji-mini", 2496), ("owner/name", 1000)):
        found = plan(load_config("debug", ["budget=1h", f"data.source={source}"]), **SLOW)
        assert {stage.purchase.set_size for stage in found.stages if stage.purchase} == {number}
        assert found.stages[1].name.startswith(f"encode {number:,} pictures")
        assert any("assumed to be 1,000" in note for note in found.notes) == (number == 1000)


@pytest.mark.slow
def test_the_text_says_what_a_budget_buys_and_when_pictures_are_memorized():
    """The option of the command is the setting; the note comes beyond 100 passes of latent training."""
    found = plan(load_config("debug", ["budget=1h"]), **SLOW, dataset_size=20)
    many, few = found.lines(), list(command([], "debug", **SLOW, dataset_size=5000, budget="1h"))
    vae, latent, text = found.stages[0], found.stages[2], "\n".join(found.lines())
    assert f"{vae.pictures:,} pictures, {vae.pictures / 20:,.1f} passes over 20" in text
    assert f"estimate {latent.purchase.steps:,} of 8, " in text
    assert f"a discriminator from step {vae.purchase.discriminator_start:,} on" in text
    assert f"estimate: the run takes {found.seconds / 60:.1f} minutes of budget=1h" in many
    assert sum("memorizes" in line for line in many) == 1
    assert not any("memorizes" in line for line in few)
    for lines in (many, few):
        bought = [line for line in lines if line.strip().startswith(("budget", "steps", "schedule"))]
        assert len(bought) == 6
        assert all("estimate" in line for line in bought)
        assert any("estimate 21.0 minutes, 35% of 1h" in line for line in bought)


@pytest.mark.parametrize(("number", "passes"), [pytest.param(5000, 0, marks=pytest.mark.slow), (120_000, 40_000)])
def test_without_a_budget_the_total_is_that_of_all_stages(number: int, passes: int):
    """Of more than 50,000 pictures, only a part is encoded to finish the VAE, and the cache encodes all once more."""
    found = plan(load_config("debug"), **SLOW, dataset_size=number)
    encoder, decoder = coder_flops()
    stages = sum(stage.seconds for stage in found.stages[:3])
    assert found.seconds == pytest.approx(stages + (passes * encoder + 1000 * decoder) / SINGLE, rel=1e-3)
    assert any(line.startswith("estimate: the run takes ") and line.endswith("(passes only)") for line in found.lines())
    assert not any(stage.purchase for stage in found.stages)
