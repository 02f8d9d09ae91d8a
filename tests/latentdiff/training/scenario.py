"""A training run in its own process, with an accident at a chosen moment; started by the tests."""

import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import psutil
import torch
from transformers import BertModel, BertTokenizerFast  # noqa: F401 (imported once, before the processes are forked)

from latentdiff.cli import plain_errors
from latentdiff.config import load_config
from latentdiff.data import workers
from latentdiff.training import heartbeat, stages
from latentdiff.training.decisions import Decisions

TASKS = (stages.VAETraining, stages.LatentTraining)


def run(overrides, stage="train", accident=None, at=0, environment=None, recipe="debug"):
    """Train a recipe; `accident` happens at call number `at` of the function it affects."""
    os.environ.update(environment or {})
    os.environ["HF_HUB_OFFLINE"] = "1"
    multiprocessing.set_start_method("fork", force=True)  # the default here, but not of a child of a fork server
    output = dict(override.split("=", 1) for override in overrides)["output"]
    sys.stderr = sys.stdout = Path(f"{output}.{os.environ.get('RANK', '0')}.log").open("a", buffering=1)  # noqa: SIM115
    if accident:
        {"kill at step": kill_at_step, "kill while saving": kill_while_saving, "kill after deciding":
         kill_after_deciding, "full disk": full_disk, "terminate": terminate, "interrupt": interrupt,
         "not finite": not_finite, "overflow": overflow,
         "float64": float64, "spike": spike, "kill workers": kill_workers, "hang": hang,
         "terminate while saving": terminate_while_saving}[accident](at)  # fmt: skip
    with plain_errors():
        getattr(stages, stage)(load_config(recipe, overrides))
    sys.stderr.write(f"peak memory in KiB: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\n")


def check_preloaded():
    """Fail where the fork server did not import what it should."""
    assert {"warm_up", "datasets", "tensorboard"} <= sys.modules.keys()


def kill_at_step(at):
    before(TASKS, "train_step", at, die)


def kill_while_saving(at):
    before([os], "fsync", at, die)


def kill_after_deciding(at):
    """Between a decision of a run with a budget and the first step that it governs."""
    calls, append = [0], Decisions.append

    def counted(self, decision):
        append(self, decision)
        calls[0] += 1
        if calls[0] == at:
            die()

    Decisions.append = counted


def full_disk(at):
    def full():
        raise OSError(28, "No space left on device")

    before([os], "fsync", at, full)


def terminate(at):
    before(TASKS, "train_step", at, lambda: os.kill(os.getpid(), signal.SIGTERM))


def interrupt(at):
    """Ctrl-C."""
    before(TASKS, "train_step", at, lambda: os.kill(os.getpid(), signal.SIGINT))


def overflow(at):
    """Scale the loss of latent training by 1e38 from step `at` on."""
    original = stages.LatentTraining.train_step

    def train_step(self, batches, step, log):
        if step >= at:
            self.state.loss_scale = torch.full_like(self.state.loss_scale, 1e38)
        return original(self, batches, step, log)

    stages.LatentTraining.train_step = train_step


def not_finite(at):
    """Put NaN in the noise of step `at`, or of all steps from -at on, in the last process only."""
    here = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    for task in TASKS:
        original = task.train_step

        def train_step(self, batches, step, log, original=original):
            if here and (step == at or (at < 0 and step >= -at)):
                batches = [batch._replace(noise=torch.full_like(batch.noise, torch.nan)) for batch in batches]
            return original(self, batches, step, log)

        task.train_step = train_step


def spike(at):
    """Make the latents of step `at` a hundred times as large."""
    for task in TASKS:
        original = task.train_step

        def train_step(self, batches, step, log, original=original):
            if step == at:
                batches = [batch._replace(x0=100 * batch.x0, noise=100 * batch.noise) for batch in batches]
            return original(self, batches, step, log)

        task.train_step = train_step


def kill_workers(at):
    """Kill the processes that read pictures before step `at`, or before every step from -at on."""

    def kill():
        for child in psutil.Process().children():
            child.kill()

    before(TASKS, "train_step", abs(at), kill)
    if at < 0:
        workers.DataLoader = DyingLoader


class DyingLoader(torch.utils.data.DataLoader):
    """A loader whose workers are killed before their first item."""

    def __iter__(self):
        items = super().__iter__()
        for child in psutil.Process().children():
            child.kill()
        return items


def hang(at):
    """The last process stops within step `at`, while the others wait for it; patience is short."""
    heartbeat.STALL_SECONDS, heartbeat.STALL_FACTOR = 2.0, 0.0
    if os.environ.get("RANK") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
        before(TASKS, "train_step", at, lambda: time.sleep(600))


def terminate_while_saving(at):
    """SIGTERM before step 2, and again at call number `at` of fsync, within the save that it leads to; a slow disk."""
    terminate(2)
    synced = os.fsync

    def slow(descriptor):
        time.sleep(0.1)
        return synced(descriptor)

    os.fsync = slow
    before([os], "fsync", at, lambda: os.kill(os.getpid(), signal.SIGTERM))


def float64(_):
    """Compute in float64 whatever is normally float32, to tell rounding from bugs."""
    single, fused = torch.float32, torch._fused_adamw_

    def fused_adamw(parameters, gradients, first, second, largest, steps, *, grad_scale, found_inf, **settings):
        """The kernel accepts counters and scale in float32 only."""
        assert not found_inf
        torch._foreach_div_(gradients, grad_scale)
        taken = [step.to(single) for step in steps]
        fused(parameters, gradients, first, second, largest, taken, grad_scale=None, found_inf=None, **settings)

    torch.set_default_dtype(torch.float64)
    torch.float32, torch.Tensor.float, torch._fused_adamw_ = torch.float64, torch.Tensor.double, fused_adamw


def before(places, name, at, act):
    """Call `act` before call number `at` of a function, counted over all places together."""
    calls = [0]
    for place in places:
        original = getattr(place, name)

        def counted(*args, original=original):
            calls[0] += 1
            if calls[0] == at:
                act()
            return original(*args)

        setattr(place, name, counted)


def die():
    os.kill(os.getpid(), signal.SIGKILL)
