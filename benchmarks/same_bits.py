"""Does a change preserve every bit? Hashes of the training runs, samples and exports of two checkouts, compared.

    python benchmarks/same_bits.py measure before.json --checkout ../before
    python benchmarks/same_bits.py measure after.json
    python benchmarks/same_bits.py compare before.json after.json

Runs on one CPU thread in float32; two tables are comparable if they come from the same machine. A model is hashed by
its tensors sorted by name (name, dtype, shape, bytes), a picture by its pixels. Takes ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
RUNS = {  # overrides of the recipe `debug`
    "train": [],
    "train, uncached": ["train_latent.cache=false"],
    "train, frozen text encoder": ["text_encoder.pretrained=builtin:emoji-256", "text_encoder.train=false"],
    "train, cosine": ["train_latent.lr_schedule=cosine", "train_vae.lr_schedule=cosine"],
}

PICTURES = """
import hashlib, json, sys, torch
import numpy as np
from PIL import Image
from diffusers import EulerAncestralDiscreteScheduler
from latentdiff import LatentPipeline

def digest(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]

torch.set_num_threads(1)
pipe = LatentPipeline.from_pretrained(device="cpu", dtype=torch.float32)
things = ("red apple", "cat", "heart", "ball")
prompts = [f"a {style} emoji of a {thing}" for style in ("3d", "noto") for thing in things]
found = {}
scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler_config)
for guidance in (1.0, 3.0):
    for sampler in ("ddpm", "ddim", "euler", "dpmpp_2m", "dpmpp_2m_sde", scheduler):
        name = sampler if isinstance(sampler, str) else type(sampler).__name__
        images = pipe(prompts, seed=0, sampler=sampler, num_steps=10, guidance_scale=guidance)
        found[f"8 pictures, {name}, guidance {guidance:g}"] = digest(*images)
weighted = pipe("a 3d emoji of a (red:1.4) apple", seed=3, num_steps=10, guidance_rescale=0.5,
                guidance_interval=(0.5, 5.0), negative_prompt="blue", num_images=3, batch_size=2)
found["prompt weights, rescale, interval, negative prompt"] = digest(*weighted)
apple = weighted[0]
mask = Image.new("L", apple.size, 0)
mask.paste(255, (16, 16, 48, 48))
found["img2img"] = digest(*pipe.img2img("a 3d emoji of a heart", apple, seed=1, num_steps=10))
found["inpaint"] = digest(*pipe.inpaint("a 3d emoji of a heart", apple, mask, seed=1, num_steps=10))
inverted = pipe.invert(apple, "a 3d emoji of a red apple", num_steps=10)
found["invert"] = digest(inverted.latents.numpy(), inverted.image)
found["interpolate"] = digest(*pipe.interpolate(prompts[0], prompts[1], 4, seed=2, num_steps=10),
                              *pipe.interpolate((apple, prompts[0]), prompts[1], 3, seed=2, num_steps=10))
found["exaggerate"] = digest(*pipe.exaggerate(prompts[0], "a 3d emoji of a blue apple", 0.7, seed=4, num_steps=10),
                             *pipe.exaggerate(prompts[0], (prompts[0], prompts[1]), 0.5, image=apple, num_steps=10))
found["stream"] = digest(*[step.x.numpy() for step in pipe.stream(prompts[:2], seed=5, num_steps=5)])
print(json.dumps(found))
"""


def tensors(folder: Path) -> str:
    """Hash all tensors below a folder, or in a file: file, name, dtype, shape and bytes."""
    total = hashlib.sha256()
    files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else [folder]
    for path in files:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name).contiguous()
                total.update(
                    f"{path.parent.name if len(files) > 1 else ''} {name} {tensor.dtype} {tensor.shape}".encode()
                )
                total.update(tensor.reshape(-1).view(__import__("torch").uint8).numpy())
    return total.hexdigest()[:16]


class Checkout:
    """Runs the programs of a checkout in a separate folder."""

    def __init__(self, path: Path, work: Path) -> None:
        self.work = work
        self.environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                            "ACCELERATE_USE_CPU": "1", "HF_DATASETS_CACHE": str(work / "cache")}  # fmt: skip

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a Python program in the background."""
        return subprocess.Popen([sys.executable, *command], cwd=self.work, env=self.environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def run(self, *command: str) -> str:
        """Return what a Python program prints."""
        program = self.start(*command)
        printed, errors = program.communicate()
        if program.returncode:
            raise SystemExit(f"{' '.join(command)[:200]}\n{errors[-3000:]}")
        return printed

    def train(self, name: str, overrides: list[str], *launcher: str) -> str:
        """Train the recipe `debug`; returns the hash of the model."""
        self.run(*launcher, *self.training(name, overrides))
        return tensors(self.work / name / "model")

    def training(self, name: str, overrides: list[str]) -> list[str]:
        """Return the command of a training run."""
        return ["-m", "latentdiff", "train", "--config", "debug", "threads=1", "trackers=[]", "precision=fp32",
                f"output={name}", *overrides]  # fmt: skip

    def killed(self, name: str) -> str:
        """Do as `train` without overrides, but kill both stages after their first checkpoint and resume."""
        kills = 0
        for stage in ("train_vae", "train_latent"):
            program = self.start(*self.training(name, []))
            while program.poll() is None:
                if (self.work / name / stage / "checkpoints" / "step-00000010").is_dir():
                    program.send_signal(signal.SIGKILL)
                    program.communicate()
                    kills += 1
                    break
                time.sleep(0.005)
        print(f"  killed {kills} times", file=sys.stderr)
        return self.train(name, [])


def measure(path: Path) -> dict[str, str]:
    """Return all hashes of a checkout."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout(path.resolve(), Path(folder))
        for number, (name, overrides) in enumerate(RUNS.items()):
            found[name] = checkout.train(f"run-{number}", overrides)
            print(name, found[name], file=sys.stderr)
        found["train, preview"] = hashlib.sha256((Path(folder) / "run-0/train_latent/samples/step-00000020.png")
                                                 .read_bytes()).hexdigest()[:16]  # fmt: skip
        launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
        command = checkout.training("two", [])
        checkout.run(*launcher, *command)
        found["train, two processes"] = tensors(Path(folder) / "two" / "model")
        found["train, killed and resumed"] = checkout.killed("killed")
        for name in ("train, two processes", "train, killed and resumed"):
            print(name, found[name], file=sys.stderr)
        found |= json.loads(checkout.run("-c", PICTURES).splitlines()[-1])
        checkout.run("-m", "latentdiff", "export", "emoji-256", "exported", "--precision", "bf16", "--shard-gb", "0.01")
        found["export, folder"] = tensors(Path(folder) / "exported")
        checkout.run("-m", "latentdiff", "export", "emoji-256", "exported.safetensors", "--format", "single")
        found["export, single file"] = tensors(Path(folder) / "exported.safetensors")
    return found


def compare(before: dict[str, str], after: dict[str, str]) -> int:
    """Print both tables; returns how many hashes differ."""
    differ = [name for name in before | after if before.get(name) != after.get(name)]
    for name in before | after:
        print(f"{'DIFFERS' if name in differ else 'equal':<8} {before.get(name)} {after.get(name)}  {name}")
    print(f"{len(before | after) - len(differ)} equal, {len(differ)} differ")
    return len(differ)


def main() -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    taking = commands.add_parser("measure")
    taking.add_argument("output", type=Path)
    taking.add_argument("--checkout", type=Path, default=ROOT)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        return int(compare(json.loads(given.before.read_text()), json.loads(given.after.read_text())) > 0)
    given.output.write_text(json.dumps(measure(given.checkout), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
