"""Autoregressive models, VAEs, GANs and diffusion on one data set: the shipped emoji at 16x16, a million weights each.

    python examples/four_families --output outputs/four_families

trains all four, two at a time on a core each, measures them and draws a figure: about 20 minutes on two cores, offline.
Finished parts are kept in the output folder: given again after an interruption, the command goes on from there.
"""

import argparse
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from figure import draw_figure
from measuring import Reference, measure
from pictures import histogram_bits, load, png_bits
from training import RECIPES


def table(results: dict[str, Any], baselines: dict[str, float], real: dict[str, float], times: bool = True) -> str:
    """Return the results as Markdown; without times, it is the same for one seed on one machine."""
    columns = ["parameters", "steps x batch", "bits/dim", "Fréchet distance", "precision", "recall", "coverage",
               "sharpness", "last five checkpoints", "three short runs"]  # fmt: skip
    columns += ["s to train", "s for 1", "s a picture of 500"] if times else []
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    quality = ("Fréchet distance", "precision", "recall", "coverage", "sharpness")
    for name, found in results.items():
        bits = ", ".join(f"{value:.3f} ({kind})" for kind, value in found["density"].items())
        cells = [f"{found['parameters']:,}", f"{found['steps']} x {found['batch']}",
                 f"{bits} ± {found['error']:.3f}" if bits else "none",
                 *(f"{found[key]:.2f}" for key in quality),
                 *(f"{statistics.mean(found[key]):.2f} ± {statistics.stdev(found[key]):.2f}"
                   for key in ("checkpoints", "seeds"))]  # fmt: skip
        if times:
            cells += [f"{found['training seconds']:.0f}", f"{found['seconds for one']:.3f}",
                      f"{found['seconds for 500'] / 500:.4f}"]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    empty = ["", "", "", *(f"{real[key]:.2f}" for key in quality), *[""] * (len(columns) - 8)]
    lines.append("| other real pictures | " + " | ".join(empty) + " |")
    for name, value in baselines.items():
        lines.append(f"| {name} | | | {value:.3f} |" + " |" * (len(columns) - 3))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/four_families"), help="folder for all results")
    parser.add_argument("--seed", type=int, default=0, help="seed of the long training runs and of what is drawn")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training steps, to try it out")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # before the processes fork
    pictures = load()
    reference = Reference(pictures)
    rest = (pictures, reference, args.seed, args.scale, args.output)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        for done in [pool.submit(measure, name, *rest) for name in RECIPES]:
            done.result()
    found = {name: measure(name, *rest) for name in RECIPES}  # all of it read from the folder
    results, models = ({name: each[part] for name, each in found.items()} for part in (0, 1))
    baselines = {"histogram": histogram_bits(pictures), "PNG": png_bits(pictures.held_out)}
    real = reference.quality(reference.second)
    text = table(results, baselines, real)
    (args.output / "table.md").write_text(text + "\n", encoding="utf-8")
    (args.output / "table-without-times.md").write_text(table(results, baselines, real, times=False) + "\n", "utf-8")
    draw_figure(models, pictures, args.seed).save(args.output / "four_families.png", optimize=True)
    print(text, f"figure: {args.output / 'four_families.png'}", sep="\n")


if __name__ == "__main__":
    main()
