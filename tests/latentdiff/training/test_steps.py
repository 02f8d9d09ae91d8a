"""A single step in detail: no waiting for the device, learning rates, the update itself, trackers, launch."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latentdiff import LatentDiffError
from latentdiff.config import load_config
from latentdiff.data.sources import open_source
from latentdiff.diffusion import process, schedule
from latentdiff.training import contention
from latentdiff.training import launch as launching
from latentdiff.training.latent import LatentTraining
from latentdiff.training.logging import MetricLogger
from latentdiff.training.loop import SkippedSteps
from latentdiff.training.optimizer import TrainState
from latentdiff.training.stages import make_caches, new_unet, open_text_encoder
from latentdiff.training.timetable import learning_rate
from latentdiff.training.vae import VAETraining
from vae import VAE

WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")


class Waits(TorchDispatchMode):
    """Records what would wait for a GPU: values read by the host, and data-dependent sizes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::equal",
            "aten::masked_select",
        ):
            self.found.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def run(tmp_path, pictures):
    overrides = [f"output={tmp_path}", f"data.source={pictures}", "precision=fp32", "threads=1", "trackers=[]"]
    return launching.launch(load_config("debug", overrides))


@pytest.fixture
def vae(run):
    return VAE(run.config.vae.build(run.config.data.image_size))


@pytest.fixture
def latent_task(run, vae, tmp_path):
    sources = open_source(run.config.data)
    encoder = open_text_encoder(run.config, sources[0])
    caches = make_caches(run, sources, vae, encoder)
    return LatentTraining(run, tmp_path / "latent", sources, vae, new_unet(run.config, vae, encoder), encoder, caches)


@pytest.fixture
def vae_task(run, vae, tmp_path):
    return VAETraining(run, tmp_path / "vae", open_source(run.config.data), vae)


@pytest.mark.parametrize("kind", ["latent", "vae"])
def test_a_step_never_waits_for_the_device(kind, request, run, tmp_path, monkeypatch):
    """On a CPU values may be inspected for free; with that switched off, as on a GPU, nothing is read."""
    task = request.getfixturevalue(f"{kind}_task")
    log = MetricLogger(run, tmp_path, kind, 0, 100, 8)
    skips = SkippedSteps(run.device)
    for module in (schedule, process):
        monkeypatch.setattr(module, "can_read_values", lambda x: False)
    read = []
    for name in ("tolist", "cpu", "numpy"):  # which bypass the dispatcher
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, name=name, original=original: (read.append(name), original(*args))[1]
        )
    batches = list(task.batches(0, 14))  # the discriminator joins at step 11
    read.clear()  # batches are made on the CPU
    with Waits() as waits:
        for step in (1, 2, 13, 14):
            metrics, finite = task.train_step(batches[step - 1], step, log)
            log.add(metrics, finite)
            skips.add(finite)
    assert waits.found == []
    assert read == []
    log.log(14, {})
    skips.read()
    assert read == ["tolist", "tolist"]  # the recording works
    with Waits() as waits:
        float(metrics["loss"])
    assert waits.found


def test_the_learning_rate_warms_up_and_falls():
    settings = ("steps=110", "warmup_steps=10", "learning_rate=2", "lr_schedule=cosine", "final_lr=0.5")
    section = load_config("debug", [f"train_latent.{setting}" for setting in settings]).train_latent
    assert learning_rate(1, section) == 0.1
    assert learning_rate(10, section) == 1.0
    assert math.isclose(learning_rate(60, section), 0.25 + 0.75 * 0.5)
    assert math.isclose(learning_rate(110, section), 0.25)
    constant = section.model_copy(update={"lr_schedule": "constant"})
    assert learning_rate(5, constant) == 0.5
    assert learning_rate(10**6, constant) == 1.0


def tensors(*sizes):
    return {str(number): torch.nn.Parameter(torch.randn(size)) for number, size in enumerate(sizes)}


def test_the_update_is_adamw_with_clipping():
    """Against torch's own loop: clip_grad_norm_, unfused AdamW, two groups with their learning rates."""
    section = load_config("debug", ["train_latent.max_grad_norm=0.7", "train_latent.warmup_steps=0"]).train_latent
    ours, theirs = tensors((3, 4), (5,)), None
    theirs = {name: torch.nn.Parameter(tensor.detach().clone()) for name, tensor in ours.items()}
    state = TrainState([({"0": ours["0"]}, 1e-2), ({"1": ours["1"]}, 1e-3)], section)
    groups = [{"params": [theirs["0"]], "lr": 1e-2}, {"params": [theirs["1"]], "lr": 1e-3}]
    adamw = torch.optim.AdamW(groups, betas=section.betas, weight_decay=section.weight_decay, foreach=False)
    for step in range(1, 30):
        for name in ours:
            ours[name].grad = torch.randn_like(ours[name]) * step % 3
            theirs[name].grad = ours[name].grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), section.max_grad_norm)
        adamw.step()
        norm = state.gradient_norm()
        assert torch.allclose(norm, expected)
        state.update(step, norm, norm.isfinite().float())
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_finite_no_bit(value):
    section = load_config("debug").train_latent
    parameters = tensors((3, 4), (5,))
    state = TrainState([(parameters, 1e-2)], section)
    for step in (1, 2, 3):
        before = {what: {name: t.clone() for name, t in values.items()} for what, values in state.tensors().items()}
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        if step == 3:
            parameters["1"].grad[2] = value
        norm = state.gradient_norm()
        state.update(step, norm, norm.isfinite().float())
        pairs = {f"{what}.{name}": (before[what][name], values[name])
                 for what, values in state.tensors().items() for name in values}  # fmt: skip
        moved = [name for name, (old, new) in pairs.items() if not torch.equal(old, new)]
        assert bool(moved) == (step < 3), moved


def test_fp16_scales_the_loss_and_halves_it_after_an_overflow():
    section = load_config("debug", ["train_latent.warmup_steps=0"]).train_latent
    plain, scaled = tensors((4,)), None
    scaled = {name: torch.nn.Parameter(tensor.detach().clone()) for name, tensor in plain.items()}
    states = [TrainState([(plain, 1e-2)], section), TrainState([(scaled, 1e-2)], section, fp16=True)]
    for step in (1, 2):
        gradient = torch.randn(4)
        for parameters, state in zip((plain, scaled), states, strict=True):
            parameters["0"].grad = gradient * state.loss_scale
            norm = state.gradient_norm()
            assert torch.allclose(norm, gradient.norm())
            state.update(step, norm, norm.isfinite().float())
        assert torch.allclose(plain["0"], scaled["0"], atol=1e-6)
    before = float(states[1].loss_scale)
    scaled["0"].grad = torch.full((4,), math.inf)
    norm = states[1].gradient_norm()
    states[1].update(3, norm, norm.isfinite().float())
    assert float(states[1].loss_scale) == before / 2


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(LatentDiffError, match="precision=fp16: not supported on a CPU"):
        launching.choose_precision("fp16", torch.device("cpu"))


def test_trackers(run, tmp_path):
    with pytest.raises(LatentDiffError, match=r"unknown tracker 'tensorbord'.*did you mean 'tensorboard'"):
        launching.choose_trackers(["tensorbord"])
    with pytest.raises(LatentDiffError, match="aim is not installed"):
        launching.choose_trackers(["aim"])


def test_metrics_are_means_and_the_time_is_accounted_for(run, tmp_path):
    log = MetricLogger(run, tmp_path, "train", 0, 100, 8)
    for value in (1.0, 2.0, 6.0):
        log.add({"loss": torch.tensor(value)}, torch.tensor(1.0))
    assert log.log(3, {})["loss"] == 3.0
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert math.isclose(sum(line[f"time_{name}"] for name in ("data", "model", "optimizer", "other")), 1.0)


SPIN = """
import os, time
os.sched_setaffinity(0, {cpu})
until = time.monotonic() + 20
while time.monotonic() < until:
    pass
"""


def test_waiting_for_a_cpu_that_another_process_uses_is_measured():
    """In a thread of its own, so that the affinity of this process stays as it is."""
    found = []

    def measure():
        cpu = min(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpu})
        other = subprocess.Popen([sys.executable, "-c", SPIN.format(cpu={cpu})])
        before, until = contention.waiting_seconds(), time.monotonic() + 15
        while time.monotonic() < until and contention.waiting_seconds() < before + 0.5:
            pass
        found.append(contention.waiting_seconds() - before)
        other.kill()
        other.wait()

    try:
        os.sched_setaffinity(0, os.sched_getaffinity(0))
    except (AttributeError, OSError) as error:
        pytest.skip(f"the affinity of this process cannot be set ({error})")
    if contention.waiting_seconds() is None:
        pytest.skip("this system does not say how long a thread has waited")
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    assert found[0] >= 0.5


@pytest.mark.parametrize(("waited", "seconds", "lines"), [(0.6, 10, 1), (0.1, 10, 0), (None, 10, 0), (0.6, 0.1, 0)])
def test_a_shared_cpu_is_said_once(run, tmp_path, monkeypatch, waited, seconds, lines):
    said, now = [], [100.0]
    schedstat = tmp_path / "schedstat"

    def scheduled(share):
        schedstat.write_text("0 0 5" if waited is None else f"9 {int((now[0] - 100) * share * 1e9)} 5")

    monkeypatch.setattr(contention, "SCHEDULED", schedstat)
    monkeypatch.setattr(contention, "time", SimpleNamespace(monotonic=lambda: now[0]))
    scheduled(0.0)
    log = MetricLogger(dataclasses.replace(run, report=said.append), tmp_path, "train", 0, 100, 8)
    for step in (1, 2, 3):
        now[0] += seconds
        scheduled((waited or 0.0) + 0.01 * step)  # each time another share
        log.add({"loss": torch.tensor(1.0)}, torch.tensor(1.0))
        log.log(step, {})
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == lines
    assert all(
        "61% of the time" in line and "processes=1, each with threads=1 and workers=0" in line for line in warnings
    )


def test_a_system_that_does_not_say_how_long_a_thread_waited(tmp_path, monkeypatch):
    monkeypatch.setattr(contention, "SCHEDULED", tmp_path / "none")
    assert contention.waiting_seconds() is None


def test_resuming_forgets_the_lines_that_come_again(run, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    MetricLogger(run, tmp_path, "train", 2, 100, 8)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
