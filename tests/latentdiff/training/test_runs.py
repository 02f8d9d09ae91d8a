"""Training runs that are killed, resumed, run by two processes or fed NaN."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from equality import same
from PIL import Image

from latentdiff import LatentPipeline
from latentdiff.data.order import random_stream
from latentdiff.evaluation.grid import labeled_grid
from latentdiff.files.launches import last_launch

STAGES = ("train_vae", "train_latent")
EVERY_STEP = ("train_vae.log_every=1", "train_latent.log_every=1", "train_vae.micro_batch_size=null",
              "train_latent.micro_batch_size=null")  # fmt: skip


def expected(uninterrupted, precision, stage):
    from latentdiff.training.checkpoint import newest_checkpoint

    checkpoint = newest_checkpoint(uninterrupted(precision) / stage / "checkpoints", print)
    return {f"{f}/{k}": t for f in checkpoint.names() for k, t in checkpoint.tensors(f).items()}


def some_moment(seed):
    """One of the 12 steps of both stages, or of the syncs of their four saves."""
    generator = random.Random(seed)
    kind, most = generator.choice((("kill at step", 12), ("kill while saving", 45)))
    return generator.choice(("fp32", "bf16")), kind, generator.randint(1, most)


@pytest.mark.parametrize(
    ("precision", "accident", "at"),
    [("fp32", "kill while saving", 45), pytest.param("fp32", "kill at step", 5, marks=pytest.mark.slow),
     pytest.param("bf16", "kill at step", 9, marks=pytest.mark.slow),
     *(pytest.param(*some_moment(seed), marks=pytest.mark.slow) for seed in range(20))],
)  # fmt: skip
def test_a_killed_run_continues_bit_for_bit(train, state, log, uninterrupted, precision, accident, at):
    """kill -9 at a step or between two syncs of a save, in either stage: all tensors equal an uninterrupted run's."""
    settings = [f"precision={precision}"]
    assert train("run", *settings, accident=accident, at=at) == -9
    assert train("run", *settings) == 0
    for stage in STAGES:
        step, tensors = state("run", stage)
        assert step == 6
        assert same(tensors, expected(uninterrupted, precision, stage)), stage
        assert log("run", stage=stage) == log(uninterrupted(precision), stage=stage)


@pytest.mark.slow
def test_killed_again_and_again(train, state, log, uninterrupted):
    for at in (2, 5, 2, 5):
        assert train("run", accident="kill at step", at=at) in (-9, 0)
    assert train("run") == 0
    for stage in STAGES:
        assert same(state("run", stage)[1], expected(uninterrupted, "fp32", stage))
        assert log("run", stage=stage) == log(uninterrupted("fp32"), stage=stage)


@pytest.mark.slow
def test_the_log_has_every_step_once(train, uninterrupted, tmp_path):
    """Killed after step 4 was logged and before it was saved; a line of several steps has their mean."""
    assert train("run", *EVERY_STEP[:2], accident="kill at step", at=11) == -9
    assert train("run", *EVERY_STEP[:2]) == 0
    for stage in STAGES:
        lines = [json.loads(line) for line in (tmp_path / "run" / stage / "log.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
        lines = [json.loads(line) for line in (uninterrupted("fp32") / stage / "log.jsonl").read_text().splitlines()]
        means = {step: sum(losses[s] for s in range(step - 2, step + 1)) / 3 for step in (3, 6)}
        assert {line["step"]: line["loss"] for line in lines if "loss" in line} == pytest.approx(means, rel=1e-6)
    assert list(uninterrupted("fp32").rglob("events.out.tfevents.*"))  # TensorBoard's, where it is installed


@pytest.mark.parametrize(
    ("processes", "accident", "code", "name"),
    [(1, "terminate", 143, "SIGTERM"), (2, "terminate", 143, "SIGTERM"),
     *(pytest.param(processes, "interrupt", 130, "SIGINT", marks=pytest.mark.slow) for processes in (1, 2))],
)  # fmt: skip
def test_a_signal_saves_within_a_step(train, state, said, processes, accident, code, name):
    assert train("run", processes=processes, accident=accident, at=10) == code
    step, _ = state("run")
    assert step == 4
    assert f"stopped at step 4 of 6: {name}" in said("run")
    assert (
        'To go on, give the same command again; to sample from it as it is: latentdiff sample "a prompt" -m '
        in said("run")
    )
    assert "Traceback" not in said("run")
    if processes == 1 and name == "SIGTERM":
        assert train("vae", accident="terminate", at=2) == 128 + 15
        assert "give the same command again; the VAE is not finished, so nothing can be sampled yet" in said("vae")


def worst(one, two):
    """The largest relative difference between the values of two runs."""
    assert one.keys() == two.keys()
    return max(abs(two[step] / one[step] - 1) for step in one)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-5), pytest.param("bf16", 2e-3, marks=pytest.mark.slow)]
)
def test_two_processes_train_what_one_does(train, log, uninterrupted, precision, tolerance, tmp_path):
    """The same samples and the same noise; losses equal up to rounding, in either stage.

    Without the discriminator: adversarial training amplifies rounding. See the next test.
    """
    settings = [f"precision={precision}", "train_vae.adversarial_weight=0", *EVERY_STEP]
    assert train("one", *settings) == 0
    (tmp_path / "two").mkdir()
    assert train("two", *settings, stage="train_vae", processes=2) == 0
    shutil.rmtree(tmp_path / "two" / "vae")  # so that latent training starts from the same latents
    shutil.copytree(tmp_path / "one" / "vae", tmp_path / "two" / "vae")
    assert train("two", *settings, stage="train_latent", processes=2) == 0
    for stage in STAGES:
        one, two = log("one", stage=stage), log("two", stage=stage)
        assert set(one) == set(range(1, 7))
        assert worst(one, two) < tolerance, stage


@pytest.mark.parametrize("counts", [(2, 1), pytest.param((2, 1, 4), marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on(train, state, log, uninterrupted, counts):
    """Stopped after every second step, and resumed by more or fewer processes: the same samples, up to rounding."""
    settings = [f"vae.pretrained={uninterrupted('fp32')}", "train_latent.log_every=1", *(f"{stage}.{setting}"
                for stage in STAGES for setting in ("batch_size=8", "micro_batch_size=null"))]  # fmt: skip
    assert train("one", *settings, stage="train_latent") == 0
    for number, processes in enumerate(counts, start=1):
        accident = {"accident": "terminate", "at": 2} if number < len(counts) else {}
        code = train("some", *settings, stage="train_latent", processes=processes, **accident)
        assert code == (143 if accident else 0)
        assert state("some")[0] == (2 * number if accident else 6)
    assert worst(log("one"), log("some")) < 1e-5
    (_, one), (_, some) = state("one"), state("some")
    assert one.keys() == some.keys()
    assert all(torch.allclose(one[name], some[name], atol=2e-5) for name in one)


@pytest.mark.slow
def test_two_processes_play_against_the_discriminator_as_one_does(train, log):
    """In float64, where any remaining difference is a bug rather than rounding.

    In float32 the losses are 1e-5 to 1e-4 apart after 20 steps, depending on the CPU: the hinge loss does not see a
    shift of all logits, so the gradient of the discriminator's last bias is pure rounding, which AdamW scales to a full
    step.
    """
    for name, processes in (("one", 1), ("two", 2)):
        assert train(name, *EVERY_STEP, stage="train_vae", processes=processes, accident="float64") == 0
    assert len(log("one", "discriminator_loss", stage="train_vae")) == 3  # the discriminator takes part
    for value in ("loss", "norm", "adaptive_weight", "discriminator_loss"):
        assert worst(*(log(name, value, stage="train_vae") for name in ("one", "two"))) < 1e-12, value


@pytest.mark.slow
def test_fsdp_trains_saves_and_continues(train, state, log, weights, uninterrupted, tmp_path):
    """Two processes with sharded weights match one process up to rounding, and resume bit for bit."""
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    bands = "validation.timestep_bands=3"  # three batches for two processes, which must call the model equally often
    snapshots = "train_latent.ema_snapshots=2"
    for name in ("run", "again"):
        shutil.copytree(uninterrupted("fp32") / "vae", tmp_path / name / "vae")
    assert train("run", bands, snapshots, processes=2, stage="train_latent", environment=fsdp) == 0
    interrupted = {"processes": 2, "stage": "train_latent", "environment": fsdp}
    assert train("again", snapshots, **interrupted, accident="terminate", at=4) == 143
    assert state("again")[0] == 4
    assert train("again", snapshots, **interrupted) == 0
    assert same(state("run")[1], state("again")[1])
    averages = weights(tmp_path / "run" / "train_latent" / "snapshots" / "step-00000006" / "ema_100.safetensors")
    assert same(averages, {name.removeprefix("model-ema/"): tensor for name, tensor in state("run")[1].items()
                           if name.startswith("model-ema/")})  # fmt: skip
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        sharded, one = (weights(f / "model" / f"{part}.safetensors") for f in (tmp_path / "run", uninterrupted("fp32")))
        assert sharded.keys() == one.keys()
        assert all(torch.allclose(sharded[name], one[name], atol=2e-5) for name in one)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_previews_are_what_the_pipeline_samples(train, uninterrupted, tmp_path, processes):
    """Prompt weights included; on two processes with FSDP, where the text encoder runs inside the model's call."""
    shutil.copytree(uninterrupted("fp32") / "vae", tmp_path / "run" / "vae")
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if processes > 1 else {}
    prompts = ["a (red:3) circle", "a red circle", "a blue square"]
    override = f"validation.prompts={json.dumps(prompts)}"
    assert train("run", override, stage="train_latent", processes=processes, environment=fsdp) == 0
    pipe = LatentPipeline.from_pretrained(tmp_path / "run", device="cpu", dtype=torch.float32)
    streams = [random_stream(0, "samples", 0, place) for place in range(len(prompts))]
    noise = torch.from_numpy(np.stack([stream.standard_normal((4, 16, 16), dtype=np.float32) for stream in streams]))
    images = pipe(prompts, latents=noise, num_steps=4)
    weighted, plain = (np.asarray(image).astype(int) for image in images[:2])
    assert np.abs(weighted - plain).max() > 5  # the weight has an effect
    expected = np.asarray(labeled_grid(images, prompts, columns=2)).astype(int)
    preview = np.asarray(Image.open(tmp_path / "run/train_latent/samples/step-00000006.png")).astype(int)
    assert np.abs(preview - expected).max() <= 1


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_is_skipped_everywhere(train, state, log, uninterrupted, tmp_path, processes, stage):
    """NaN on one of two processes at the third step: no tensor changes on either, and the step is counted."""
    if stage == "train_latent":
        shutil.copytree(uninterrupted("fp32") / "vae", tmp_path / "run" / "vae")
    name = f"{stage}.checkpoint_every=1"
    keep = f"{stage}.keep_checkpoints=4"
    settings = [
        name,
        keep,
        f"{stage}.steps=3",
        f"{stage}.warmup_steps=1",
        f"{stage}.log_every=1",
        f"{stage}.micro_batch_size=null",
    ]
    assert train("run", *settings, processes=processes, stage=stage, accident="not finite", at=3) == 0
    from latentdiff.training.checkpoint import Checkpoint

    before, after = (
        Checkpoint(step, tmp_path / "run" / stage / "checkpoints" / f"step-{step:08d}", {}) for step in (2, 3)
    )
    for file in before.names():
        if file != "skips":
            assert same(before.tensors(file), after.tensors(file)), file
    assert after.tensors("skips")["counts"].tolist() == [1, 1]
    assert log("run", "skipped", stage) == {3: 1}


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(train, state, said, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted("fp32") / "vae", tmp_path / "run" / "vae")
    assert (
        train(
            "run",
            "train_latent.max_skipped=3",
            "train_latent.log_every=2",
            stage="train_latent",
            accident="not finite",
            at=-2,
        )
        == 1
    )
    assert state("run")[0] == 4  # steps 2 to 4 were not finite; the count is read when step 4 is logged
    assert "error: stopped at step 4 of 6: the loss was not finite in 3 steps in a row" in said("run")
    assert all(tensor.isfinite().all() for tensor in state("run")[1].values())


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_gradients_that_overflow_stop_the_run_with_a_checkpoint(train, state, said, uninterrupted, tmp_path, precision):
    """The loss times 1e38 from step 3 on: no step is taken any more, and what was learned stays."""
    settings = [f"precision={precision}", f"vae.pretrained={uninterrupted('fp32')}", *(f"train_latent.{setting}" for
                setting in ("checkpoint_every=1", "max_skipped=3", "log_every=1", "keep_checkpoints=4"))]  # fmt: skip
    assert train("run", *settings, stage="train_latent", accident="overflow", at=3) == 1
    assert "error: stopped at step 5 of 6: the loss was not finite in 3 steps in a row" in said("run")
    from latentdiff.training.checkpoint import Checkpoint

    step, after = state("run")
    assert step == 5
    assert after["skips/counts"].tolist() == [3, 3]
    before = Checkpoint(2, tmp_path / "run/train_latent/checkpoints/step-00000002", {})
    for file in before.names():
        moved = [
            name for name, tensor in before.tensors(file).items() if not torch.equal(tensor, after[f"{file}/{name}"])
        ]
        assert moved == {"skips": ["counts"], "model-scalars": ["scale"]}.get(file, []), file


def test_a_full_disk_leaves_the_checkpoint_before(train, state, said, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted("fp32") / "vae", tmp_path / "run" / "vae")
    assert train("run", stage="train_latent", accident="full disk", at=16) == 1
    assert state("run")[0] == 3
    assert "No space left on device" in said("run")
    assert "Traceback" not in said("run")
    launches = json.loads((tmp_path / "run/run.json").read_text())["launches"]
    assert (launches[-1]["end"]["trained"], last_launch(launches)) == (["train_latent"], launches[-1])
    assert train("run", stage="train_latent") == 0
    assert same(state("run")[1], expected(uninterrupted, "fp32", "train_latent"))


def test_a_vae_that_shows_nothing_is_said(train, said):
    assert train("run", "train_vae.steps=1", "train_vae.warmup_steps=0", stage="train_vae") == 0
    assert re.search(r"warning: this VAE reconstructs held-out pictures at only \d+\.\d dB", said("run"))


@pytest.mark.slow
def test_a_longer_run_continues_a_shorter_one(train, state, uninterrupted, tmp_path):
    """`steps` may grow: with a constant learning rate the first steps are the same."""
    shutil.copytree(uninterrupted("fp32") / "vae", tmp_path / "run" / "vae")
    assert train("run", "train_latent.steps=3", stage="train_latent") == 0
    shutil.rmtree(tmp_path / "run" / "model")
    assert train("run", stage="train_latent") == 0
    assert same(state("run")[1], expected(uninterrupted, "fp32", "train_latent"))


@pytest.mark.slow
def test_workers_change_nothing(train, state, uninterrupted):
    assert train("run", "workers=2") == 0
    for stage in STAGES:
        assert same(state("run", stage)[1], expected(uninterrupted, "fp32", stage))


@pytest.mark.slow
def test_the_full_recipe_takes_a_step(train, log, said, pictures):
    """ldm-text2im-large.yaml itself, at 256 px, both stages, with widths and counts reduced by overrides."""
    settings = ["vae.block_out_channels=[8, 8, 8, 8]", "vae.norm_groups=4", "vae.layers_per_block=1",
                "text_encoder.width=32", "text_encoder.num_layers=2", "text_encoder.vocab_size=600",
                "unet.block_out_channels=[16, 16, 16, 16]", "unet.norm_groups=4", "unet.num_heads=2",
                "unet.layers_per_block=1", "data.min_size=16", "workers=0", "validation.num_steps=2",
                "validation.timestep_bands=2", "train_vae.adversarial_start=1", "train_vae.discriminator_width=4",
                *(f"{stage}.{setting}" for stage in STAGES
                  for setting in ("steps=1", "warmup_steps=0", "log_every=1", "batch_size=2", "micro_batch_size=1")),
                ]  # fmt: skip
    assert train("run", *settings, recipe="ldm-text2im-large") == 0, said("run")
    for stage in STAGES:
        assert log("run", stage=stage).keys() == {1}


@pytest.mark.slow
def test_a_run_that_predicts_the_mean_opens_while_it_trains_and_when_it_is_finished(train, tmp_path):
    settings = ["diffusion.prediction=mean", "diffusion.weighting=elbo"]
    assert train("run", *settings, accident="kill at step", at=12) == -9
    with pytest.warns(UserWarning, match="its model is not finished"):
        assert LatentPipeline.from_pretrained(tmp_path / "run").process.prediction == "mean"
    assert train("run", *settings) == 0
    (image,) = LatentPipeline.from_pretrained(tmp_path / "run")("a red apple", num_steps=4, seed=0)
    assert np.asarray(image).std() > 0
