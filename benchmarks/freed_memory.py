"""What does it save on a CPU to keep freed memory, as commands do there?

    python benchmarks/freed_memory.py --config emoji-256 --batch 4

Training steps, encoding and decoding with the VAE of a recipe, each in a process of its own, in alternation: as glibc
returns memory to the system, and with `latentdiff.cli.memory`. The peak is that of the whole process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from latentdiff.cli.memory import keep_freed_memory
from latentdiff.config import load_config
from vae import VAE


def work(task: str, options: argparse.Namespace) -> Callable[[], object]:
    """Return a function that does the task once."""
    config = load_config(options.config)
    size = config.data.image_size
    vae = VAE(config.vae.build(size))
    images = torch.rand(options.batch, 3, size, size) * 2 - 1
    latents = vae.latent_posterior(images).mode().detach()
    optimizer = torch.optim.AdamW(vae.parameters(), 1e-5)

    def train() -> None:
        (vae.decode(vae.latent_posterior(images).sample()) - images).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = {"train": train, "encode": lambda: vae.latent_posterior(images), "decode": lambda: vae.decode(latents)}
    return found[task] if task == "train" else torch.no_grad()(found[task])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="emoji-256")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        if options.keep and not keep_freed_memory(torch.device("cpu")):
            raise SystemExit("nothing to compare: not glibc, or malloc is set in the environment")
        torch.set_num_threads(options.threads)
        call = work(options.task, options)
        call()
        start = time.perf_counter()
        for _ in range(options.calls):
            call()
        seconds = (time.perf_counter() - start) / options.calls
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    print(
        "| task | returned, ms | kept, ms | returned / kept | peak, MiB: returned | kept |\n|---|---|---|---|---|---|"
    )
    for task in ("train", "encode", "decode"):
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(options.rounds):
            for keep, results in found.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--task", task, *["--keep"] * keep]
                words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                results.append((float(words[0]), float(words[1])))
        ratios = [a[0] / b[0] for a, b in zip(found[False], found[True], strict=True)]
        (before, peak), (after, other) = (map(statistics.median, zip(*each, strict=True)) for each in found.values())
        print(f"| {task} | {1000 * before:.0f} | {1000 * after:.0f} | {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} – {max(ratios):.2f}) | {peak:.0f} | {other:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
