"""Is a change as quick as what it changed? Ours of two checkouts, call by call in turns, on the same weights.

    python benchmarks/same_speed.py ../former --rounds 20

The tasks are those of unet_forward.py and vae_passes.py, and pictures of the model that ships. Each checkout runs in a
process of its own, one waits while the other computes; outputs must be equal. now / former: the ratio of the median
times with its bootstrap 90 % interval; above 1, the change is slower.
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
CONTESTS = {  # and pictures a call
    "unet": (Contest(UNet, UNet2DConditionModel, UNET_TASKS, unet_forward.build, unet_forward.inputs,
                     unet_forward.forward), 4),
    "vae": (Contest(VAE, AutoencoderKL, VAE_TASKS, vae_passes.build, vae_passes.inputs, vae_passes.forward), 1),
}  # fmt: skip
DRAW = "draw: 8 pictures, 5 steps"


def tasks() -> list[str]:
    """All that is timed."""
    return [*(f"{name}: {task}" for name, (contest, _) in CONTESTS.items() for task in contest.tasks), DRAW]


def prepare(task: str, folder: Path, threads: int) -> Call:
    """One call of a task in this process."""
    torch.set_num_threads(threads)
    if task == DRAW:
        pipe = LatentPipeline.from_pretrained(device="cpu", dtype=torch.float32)
        prompts, settings = ["a 3d emoji of a red apple"] * 8, {"num_steps": 5, "seed": 0, "progress": False}
        return lambda: torch.from_numpy(np.stack([np.asarray(image) for image in pipe(prompts, **settings)]))
    name, _, inner = task.partition(": ")
    contest, batch = CONTESTS[name]
    model = contest.open("ours", folder / name, "float32", "cpu")
    settings = Settings("small", batch, "cpu", ["float32"], 1, threads, None, None)
    return contest.step("ours", inner, model, settings)


def serve(folder: Path, threads: int) -> None:
    """A line with a task's name makes one call of it; the answer is its seconds and a hash of what it gave."""
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        task = line.strip()
        if task not in calls:
            calls.clear()  # one model in memory at a time
            calls[task] = prepare(task, folder, threads)
        start = time.perf_counter()
        result = calls[task]()
        seconds = time.perf_counter() - start
        print(seconds, hashlib.sha256(result.detach().contiguous().numpy().tobytes()).hexdigest()[:16], flush=True)


class Worker:
    """A checkout, in a process of its own."""

    def __init__(self, place: Path, folder: Path, threads: int) -> None:
        command = [sys.executable, __file__, str(place), "--serve", str(folder), "--threads", str(threads)]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{place.resolve()}:{HERE}",
            "OMP_WAIT_POLICY": "PASSIVE",
        }  # or its idle threads take time from the other's
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)  # fmt: skip
        self.digest = ""

    def call(self, task: str) -> None:
        """Make one call there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        self.digest = self.process.stdout.readline().split()[1]


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("former", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="tasks whose names hold this")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.threads)
        return 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, (contest, _) in CONTESTS.items():
            contest.build("small").save_pretrained(folder / name)
        workers = {"now": Worker(HERE.parent, folder, options.threads),
                   "former": Worker(options.former, folder, options.threads)}  # fmt: skip
        for task in (task for task in tasks() if options.only in task):
            calls = {side: lambda worker=worker, task=task: worker.call(task) for side, worker in workers.items()}
            seconds = time_in_turns(calls, options.rounds, "cpu")
            ratio, low, high = ratio_of_medians(seconds["now"], seconds["former"])
            same = "equal outputs" if workers["now"].digest == workers["former"].digest else "OUTPUTS DIFFER"
            print(f"{task:<40} now / former {ratio:.3f} ({low:.3f} - {high:.3f})  {same}", flush=True)
        for worker in workers.values():
            worker.process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
