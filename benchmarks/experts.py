"""Are experts for bands of timesteps better than one UNet? In the arena of `ablation.py`: same pictures, small models.

    python benchmarks/experts.py

Five arms: one UNet; four experts that see as many pictures in all; four experts that each make as many passes as the
one UNet, with batches of the same size; one UNet that makes as many passes as these four; one UNet of their joint size,
which is that of the arena: the others have half its channels, a quarter of its weights. Measured are the loss of the
held-out pictures in each expert's band, without and with the caption, with the same timesteps and noise for all arms;
and how often samples of training captions show the right concept. Differences from one UNet are those of the same
pictures, or of the same concepts, averaged over the seeds; the intervals are 90 % over pictures or concepts. Finished
runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation import BASE, make_data
from numpy.typing import NDArray

from latentdiff import LatentPipeline
from latentdiff.assets import EMOJI_STYLE
from latentdiff.data.cache import read_pixels
from latentdiff.data.pictures import to_pixels
from latentdiff.data.sources import open_source
from latentdiff.diffusion.process import add_noise, diffusion_loss
from latentdiff.evaluation.evaluate import evaluate
from latentdiff.evaluation.gallery import LATENTS
from latentdiff.sampling.settings import SamplingSettings
from latentdiff.sections import DataConfig
from unet.experts import band_edges

EXPERTS, BATCH, DRAWS = 4, 32, 4
Z = 1.645  # of a 90 % interval
ONE = "one UNet"
SMALL = ("unet.block_out_channels=[32,64,96]", "unet.norm_groups=16")
ARMS: dict[str, tuple[str, ...]] = {
    ONE: SMALL,
    f"{EXPERTS} experts, same pictures in all": (*SMALL, f"unet.experts={EXPERTS}"),
    f"{EXPERTS} experts, same passes each": (
        *SMALL, f"unet.experts={EXPERTS}", f"train_latent.batch_size={EXPERTS * BATCH}"),
    f"one UNet, {EXPERTS} times the pictures": (*SMALL, f"train_latent.batch_size={EXPERTS * BATCH}"),
    "one UNet of their joint size": (),
}  # fmt: skip


@torch.no_grad()
def losses(pipe: LatentPipeline, data: DataConfig) -> NDArray[Any]:
    """Return the unweighted loss of held-out pictures by band, without and with caption: (bands, 2, pictures)."""
    source = open_source(data)[1]
    images = torch.from_numpy(np.stack([read_pixels(source, index, data) for index in range(len(source))]))
    latents = torch.cat([pipe.latents_of(to_pixels(part)) for part in torch.split(images, 32)])
    captions = [source.captions(index)[0] for index in range(len(source))]
    contexts = (pipe.text_encoder.null_context(len(latents)), pipe.text_encoder(captions))
    generator, schedule = torch.Generator().manual_seed(0), pipe.process.schedule
    edges = band_edges(EXPERTS, schedule.num_timesteps)
    found = np.zeros((EXPERTS, 2, len(latents)))
    for band, (low, high) in enumerate(pairwise(edges)):
        for _ in range(DRAWS):
            t = torch.randint(low, high, (len(latents),), generator=generator)
            noise = torch.randn(latents.shape, generator=generator)
            x_t = add_noise(latents, noise, t, schedule)
            for kind, context in enumerate(contexts):
                output = pipe.unet(x_t, t, context)
                loss = diffusion_loss(output, latents, noise, t, pipe.process.prediction, schedule)
                found[band, kind] += loss.numpy() / DRAWS
    return found


def measure(folder: Path, source: str, concepts: int) -> None:
    """Measure a trained model and write `measured.json` beside it."""
    torch.set_num_threads(1)
    pipe = LatentPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)
    data = DataConfig(source=source, flip=False, image_size=pipe.image_size)
    settings = SamplingSettings(guidance_scale=3.0, num_images=2, num_steps=15, seed=0, progress=False)
    report = evaluate(pipe, data, settings, style=EMOJI_STYLE, num_concepts=concepts).concepts
    assert report is not None
    right: dict[str, list[int]] = {}
    for row in report.rows:
        right.setdefault(row["concept"], []).append(int(row[LATENTS]["rank"] == 0))
    size = sum(parameter.numel() for parameter in pipe.unet.parameters())
    values = {"losses": losses(pipe, data).tolist(), "right": right, "parameters": size}
    (folder / "measured.json").write_text(json.dumps(values))


def run(arm: str, seed: int, arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Train and measure an arm with a seed, each in a process of its own with one thread; return the result."""
    folder = arguments.output / f"{re.sub('[^a-z0-9]+', '-', arm.lower())}-{seed}"
    result = folder / "result.json"
    if not result.is_file():
        train = [sys.executable, "-m", "latentdiff", "train-latent", "--config", "emoji-64", *BASE, *ARMS[arm],
                 "vae.pretrained=builtin:emoji-64", f"data.source={data}", f"seed={seed}", f"output={folder}",
                 f"train_latent.steps={arguments.steps}",
                 f"train_latent.warmup_steps={min(50, arguments.steps)}"]  # fmt: skip
        again = [sys.executable, __file__, "--measure", folder, "--source", data, "--asked", arguments.asked]
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        with (folder / "output.log").open("w") as log:
            for command in (train, again):
                subprocess.run(list(map(str, command)), check=True, stdout=log, stderr=subprocess.STDOUT)
                if command is train:
                    seconds = time.perf_counter() - begin
        measured = json.loads((folder / "measured.json").read_text())
        result.write_text(json.dumps(measured | {"seconds": seconds}))
        print(f"done: {arm}, seed {seed}, {seconds:.0f} s of training", file=sys.stderr, flush=True)
    return json.loads(result.read_text())


def interval(values: NDArray[Any], form: str, sign: str = "") -> str:
    """Return the mean of independent values with half the width of its interval."""
    half = Z * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():{sign}{form}} ± {half:{form}}"


def table(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print the figures of each arm, and its differences from one UNet."""
    bands = [f"band {band}" for band in range(EXPERTS)]
    print("| arm | parameters of the UNets | seconds | right concept, % | " + " | ".join(bands) + " |")
    print("|---|---|---|---|" + "---|" * EXPERTS)
    by_arm = {}
    for arm, results in found.items():
        right = [[float(np.mean(each["right"][name])) for name in sorted(each["right"])] for each in results]
        by_arm[arm] = (100 * np.array(right).mean(0), np.array([each["losses"] for each in results]).mean(0))
        seconds = np.mean([each["seconds"] for each in results])
        first = f"| {results[0]['parameters'] / 1e6:.2f}M | {seconds:.0f} | {interval(by_arm[arm][0], '.1f')} | "
        cells = [" / ".join(interval(kind, ".4f") for kind in band) for band in by_arm[arm][1]]
        print(f"| {arm} {first}" + " | ".join(cells) + " |")
    right, loss = by_arm[ONE]
    for arm in list(found)[1:]:
        cells = [" / ".join(interval(kind, ".4f", "+") for kind in band) for band in by_arm[arm][1] - loss]
        gain = interval(by_arm[arm][0] - right, ".1f", "+")
        print(f"| {arm}, minus {ONE} | | | {gain} | " + " | ".join(cells) + " |")
    print("\nLosses are without / with the caption; band 0 has the least noise.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/experts"))
    parser.add_argument("--concepts", type=int, default=104, help="training concepts, of two pictures each")
    parser.add_argument("--asked", type=int, default=128, help="at most as many of them are asked for")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    for name, kind in (("--measure", Path), ("--source", str)):  # of a process of our own, see `run`
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.source, arguments.asked)
        return
    arguments.output /= f"{arguments.concepts}-{arguments.steps}"  # keeps results of other settings apart
    data = make_data(arguments.output / "data", arguments.concepts)
    tasks = [(arm, seed) for seed in range(arguments.seeds) for arm in ARMS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda task: run(*task, arguments, data), tasks))
    table({arm: [found for task, found in zip(tasks, results, strict=True) if task[0] == arm] for arm in ARMS})


if __name__ == "__main__":
    main()
