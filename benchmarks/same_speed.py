"""Does a change cost speed? Our models of two checkouts, timed in alternation on the same weights.

    python benchmarks/same_speed.py ../before --rounds 20

The tasks are those of unet_forward.py and vae_passes.py, and sampling from the shipped model. Each checkout runs in a
separate process, one of which waits while the other computes; outputs must be equal. after / before is the ratio of
the median times with its bootstrap 90 % interval; above 1, the change is slower.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import unet_forward
import vae_passes
from diffusers import AutoencoderKL, UNet2DConditionModel
from side_by_side import TRAINING, Contest, Settings
from stopwatch import Call, ratio_of_medians, time_in_turns

from latentdiff import LatentPipeline
from unet import UNet
from vae import VAE

HERE = Path(__file__).resolve().parent
UNET_TASKS = (unet_forward.FORWARD, unet_forward.CACHED, TRAINING)
VAE_TASKS = (vae_passes.ENCODE, vae_passes.DECODE, TRAINING)
CONTESTS = {  # with pictures per call
    "unet": (Contest(UNet, UNet2DConditionModel, UNET_TASKS, unet_forward.build, unet_forward.inputs,
                     unet_forward.forward), 4),
    "vae": (Contest(VAE, AutoencoderKL, VAE_TASKS, vae_passes.build, vae_passes.inputs, vae_passes.forward), 1),
}  # fmt: skip
SAMPLING = "sample: 8 pictures, 5 steps"


def tasks() -> list[str]:
    """Return all tasks that are timed."""
    return [*(f"{name}: {task}" for name, (contest, _) in CONTESTS.items() for task in contest.tasks), SAMPLING]


def prepare(task: str, folder: Path, threads: int) -> Call:
    """Prepare a task in this process; returns one call of it."""
    torch.set_num_threads(threads)
    if task == SAMPLING:
        pipe = LatentPipeline.from_pretrained(device="cpu", dtype=torch.float32)
        prompts, settings = ["a 3d emoji of a red apple"] * 8, {"num_steps": 5, "seed": 0, "progress": False}
        return lambda: torch.from_numpy(np.stack([np.asarray(image) for image in pipe(prompts, **settings)]))
    name, _, inner = task.partition(": ")
    contest, batch = CONTESTS[name]
    model = contest.open("ours", folder / name, "float32", "cpu")
    settings = Settings("small", batch, "cpu", ["float32"], 1, threads, None, None)
    return contest.step("ours", inner, model, settings)


def serve(folder: Path, threads: int) -> None:
    """Call the task named on each input line; answer with the seconds and a hash of the output."""
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        task = line.strip()
        if task not in calls:
            calls.clear()  # keep one model in memory at a time
            calls[task] = prepare(task, folder, threads)
        start = time.perf_counter()
        result = calls[task]()
        seconds = time.perf_counter() - start
        print(seconds, hashlib.sha256(result.detach().contiguous().numpy().tobytes()).hexdigest()[:16], flush=True)


class Worker:
    """A checkout running in a separate process."""

    def __init__(self, checkout: Path, folder: Path, threads: int) -> None:
        command = [sys.executable, __file__, str(checkout), "--serve", str(folder), "--threads", str(threads)]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{checkout.resolve()}:{HERE}",
            "OMP_WAIT_POLICY": "PASSIVE",
        }  # otherwise its idle threads slow down the other process
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)  # fmt: skip
        self.digest = ""

    def call(self, task: str) -> None:
        """Make one call in the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        self.digest = self.process.stdout.readline().split()[1]


def main() -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the checkout to compare with")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="run only tasks whose names contain this")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.threads)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, (contest, _) in CONTESTS.items():
            contest.build("small").save_pretrained(folder / name)
        workers = {"after": Worker(HERE.parent, folder, options.threads),
                   "before": Worker(options.before, folder, options.threads)}  # fmt: skip
        for task in (task for task in tasks() if options.only in task):
            calls = {side: lambda worker=worker, task=task: worker.call(task) for side, worker in workers.items()}
            seconds = time_in_turns(calls, options.rounds, "cpu")
            ratio, low, high = ratio_of_medians(seconds["after"], seconds["before"])
            same = "equal outputs" if workers["after"].digest == workers["before"].digest else "OUTPUTS DIFFER"
            print(f"{task:<40} after / before {ratio:.3f} ({low:.3f} - {high:.3f})  {same}", flush=True)
        for worker in workers.values():
            worker.process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
