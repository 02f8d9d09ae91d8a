"""Does it help to see earlier steps? `unet.trajectory_attention` 0, 1 and 4, at equal seconds of training.

    python benchmarks/trajectory.py                                                      # three seeds
    python benchmarks/trajectory.py --steps 4 --calibrate 4 --seeds 1 --concepts 4 --pictures 4      # does it run?

The arena is that of benchmarks/ablation.py: 208 of the shipped pictures, a small UNet, 500 steps without a history. The
others take as many steps as fit into the same seconds, by a calibration that runs alone and is kept in steps.json.
Measured are the loss of v on the 25-step grid, with a history along the forward chain and without, and the right
concept as sampled; all with the same noise, compared picture by picture (concept by concept), means of the seeds, with
90 % intervals over pictures. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from ablation import BASE, make_data
from torch import Tensor

from latentdiff import LatentPipeline
from latentdiff.assets import EMOJI_STYLE
from latentdiff.data.batches import Chain
from latentdiff.data.sources import open_source
from latentdiff.diffusion.process import add_noise, diffusion_loss
from latentdiff.diffusion.samplers import timesteps
from latentdiff.evaluation.evaluate import evaluate
from latentdiff.evaluation.gallery import LATENTS, RGB, embed, read_pictures
from latentdiff.sampling.settings import SamplingSettings
from latentdiff.sections import DataConfig
from latentdiff.training.history import predict_after_chain

ARMS = (0, 1, 4)  # earlier steps
GRID, BATCH = 25, 32
SAMPLING = SamplingSettings(guidance_scale=3, num_images=2, num_steps=15, seed=0, progress=False)
LOSSES, SPACES = ("training", "held-out"), (LATENTS, RGB)


def train(folder: Path, data: Path, arguments: argparse.Namespace, history: int, seed: int, steps: int) -> float:
    """Train one model; returns its seconds a step."""
    command = [sys.executable, "-m", "latentdiff", "train-latent", "--config", "emoji-64", *BASE, *arguments.change,
               f"vae.pretrained={arguments.vae}", f"data.source={data}", f"seed={seed}", f"output={folder}",
               f"unet.trajectory_attention={history}", f"train_latent.steps={steps}", "report=false",
               f"train_latent.warmup_steps={min(50, steps // 2)}", "train_latent.log_every=2",
               "validation.prompts=[a 3d emoji of a red apple]", "validation.num_steps=1",
               "validation.num_pictures=8", "validation.timestep_bands=1", "train_latent.keep_best=false"]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    lines = map(json.loads, (folder / "train_latent/log.jsonl").read_text().splitlines())
    rates = [line["pictures_per_second"] for line in lines if "pictures_per_second" in line]
    return BATCH / statistics.median(rates[1:] or rates)


def calibrate(data: Path, arguments: argparse.Namespace) -> dict[str, int]:
    """Return the number of steps of each arm that take equal seconds, measured once."""
    file = arguments.output / "steps.json"
    if not file.is_file():
        seconds = [train(arguments.output / f"calibrate-{k}", data, arguments, k, 0, arguments.calibrate) for k in ARMS]
        steps = {
            str(k): max(2, round(arguments.steps * seconds[0] / each)) for k, each in zip(ARMS, seconds, strict=True)
        }
        file.write_text(json.dumps({"seconds_a_step": seconds, "steps": steps}))
    return json.loads(file.read_text())["steps"]


@torch.no_grad()
def chain_losses(pipe: LatentPipeline, latents: Tensor, captions: Sequence[str], looks_back: bool) -> Tensor:
    """Return the loss of each picture (N,), averaged over the grid; the noise is the same for all models."""
    schedule, grid, found = pipe.process.schedule, timesteps(1000, GRID), torch.zeros(len(latents))
    context, history = pipe.text_encoder(list(captions)), pipe.unet.config.trajectory_attention if looks_back else 0
    for place, now in enumerate(grid):
        random = torch.Generator().manual_seed(now)
        noise = torch.randn(latents.shape, generator=random)
        xi = torch.randn(len(latents), max(ARMS), *latents.shape[1:], generator=random)
        t, before = torch.full((len(latents),), now), grid[max(0, place - history) : place][::-1]
        x_t = add_noise(latents, noise, t, schedule)
        if before:
            chain = Chain(torch.arange(len(t)), torch.tensor(before).expand(len(t), -1), xi[:, : len(before)])
            output = predict_after_chain(lambda x, t, text, past: pipe.unet(x, t, text[0], past), x_t, t, chain,
                                         [context], schedule)  # fmt: skip
        else:
            output = pipe.unet(x_t, t, context)
        found += diffusion_loss(output, latents, noise, t, pipe.process.prediction, schedule) / GRID
    return found


def measure(folder: Path, data: Path, concepts: int, pictures: int) -> None:
    """Write evaluation.json, drawn.jsonl and losses.json for a trained model; runs in a process of its own."""
    torch.set_num_threads(1)
    pipe = LatentPipeline.from_pretrained(folder, dtype=torch.float32)
    config = DataConfig(source=str(data), flip=False, image_size=pipe.image_size)
    evaluate(pipe, config, SAMPLING, style=EMOJI_STYLE, num_concepts=concepts).write(folder)
    losses = {}
    for name, source in zip(LOSSES, open_source(config), strict=True):
        gallery = embed(pipe.vae, read_pictures(source, config, pictures, []), pipe.image_size)
        captions = [source.captions(index)[0] for index in gallery.indices]
        for looks_back in (True, False):
            parts = [chain_losses(pipe, gallery.latents[part].float(), captions[part], looks_back)
                     for start in range(0, len(captions), BATCH) for part in [slice(start, start + BATCH)]]  # fmt: skip
            losses[f"{name}{'' if looks_back else ', alone'}"] = torch.cat(parts).tolist()
    (folder / "losses.json").write_text(json.dumps(losses))


def run(arguments: argparse.Namespace, data: Path, steps: int, history: int, seed: int) -> dict[str, list[float]]:
    """Train and measure one model; returns one value for each picture or prompt."""
    folder = arguments.output / f"{history}-{seed}"
    if not (folder / "losses.json").is_file():
        second = train(folder, data, arguments, history, seed, steps)
        (folder / "second.json").write_text(json.dumps(second))
        command = [sys.executable, __file__, "--measure", folder, "--data", data, "--concepts", arguments.concepts,
                   "--pictures", arguments.pictures]  # fmt: skip
        with (folder / "output.log").open("a") as log:
            subprocess.run(list(map(str, command)), check=True, stdout=log, stderr=subprocess.STDOUT)
        print(f"done: K = {history}, seed {seed}", file=sys.stderr, flush=True)
    by_prompt: dict[str, list[dict]] = {}  # the samples of one are one observation
    for row in map(json.loads, (folder / "drawn.jsonl").read_text().splitlines()):
        by_prompt.setdefault(row["prompt"], []).append(row)
    right = {f"right concept by {name}": [statistics.mean(row[name]["rank"] == 0 for row in by_prompt[prompt])
                                          for prompt in sorted(by_prompt)] for name in SPACES}  # fmt: skip
    drawing = json.loads((folder / "evaluation.json").read_text())["seconds"]["drawing"]
    return json.loads((folder / "losses.json").read_text()) | right | {
        "seconds a step beside the other job": [json.loads((folder / "second.json").read_text())],
        "seconds of drawing": [drawing],
    }  # fmt: skip


def compare(ours: Tensor, base: Tensor) -> str:
    """Return the mean of (seeds, pictures), and its paired difference from the base with its interval."""
    difference = (ours - base).mean(0)
    interval = f" ± {1.645 * float(difference.std()) / len(difference) ** 0.5:.4f}" if len(difference) > 1 else ""
    by_seed = ", ".join(f"{value:+.4f}" for value in (ours - base).mean(1).tolist())
    return f"{ours.mean():.4f} | {difference.mean():+.4f}{interval} | {by_seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", default="builtin:emoji-64")
    parser.add_argument("--output", type=Path, default=Path("runs/trajectory"))
    parser.add_argument("--concepts", type=int, default=104)
    parser.add_argument("--pictures", type=int, default=64, help="for the losses, of either set")
    parser.add_argument("--steps", type=int, default=500, help="of the model without a history")
    parser.add_argument("--calibrate", type=int, default=30, help="steps to measure the seconds of one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--change", nargs="*", default=[], help="further section.key=value of all models")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.data, arguments.concepts, arguments.pictures)
        return
    arguments.output /= f"{arguments.concepts}-{arguments.steps}"
    data = make_data(arguments.output / "data", arguments.concepts)
    asked = json.dumps([arguments.vae, arguments.pictures, arguments.change])
    if (kept := arguments.output / "asked.json").is_file() and kept.read_text() != asked:
        parser.error(f"{arguments.output} has results of {kept.read_text()}, now {asked}: choose another --output")
    kept.write_text(asked)
    steps = calibrate(data, arguments)
    tasks = [(history, seed) for seed in range(arguments.seeds) for history in ARMS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = dict(zip(tasks, pool.map(lambda task: run(arguments, data, steps[str(task[0])], *task), tasks),
                         strict=True))  # fmt: skip
    alone = json.loads((arguments.output / "steps.json").read_text())["seconds_a_step"]
    print("seconds a step, alone: " + ", ".join(f"K = {k}: {each:.2f}" for k, each in zip(ARMS, alone, strict=True)))
    print("| measured | K | steps | mean | difference from K = 0, 90 % | by seed |\n|---|---|---|---|---|---|")
    for name in found[ARMS[0], 0]:
        values = {k: torch.tensor([found[k, seed][name] for seed in range(arguments.seeds)]).double() for k in ARMS}
        for history in ARMS:
            print(f"| {name} | {history} | {steps[str(history)]} | {compare(values[history], values[0])} |")


if __name__ == "__main__":
    main()
