"""What `make demo` runs: the shipped model samples some prompts, then a model is trained from scratch.

    python examples/demo.py --output outputs/demo

Every command is printed before it runs, so that you can run it yourself. A finished training run is not repeated; to
train again, delete the folder.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from latentdiff.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = load_config("emoji-256").validation.prompts  # the last two are compositions that are not in the training set
HEADING = 22  # pixels
LAUNCH = ("accelerate", "launch", "--quiet", "--config_file", "examples/one_process.yaml", "train_latent.py")


def run(*command: str | Path) -> None:
    """Print a command and run it; exit with its status if it fails."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    program = Path(sys.executable).with_name(words[0])  # from this environment, whatever PATH says
    child = subprocess.Popen([str(program), *words[1:]], cwd=ROOT)
    interrupted = False
    while child.poll() is None:
        try:
            child.wait()
        except KeyboardInterrupt:  # the child gets the signal too, and saves a checkpoint
            interrupted = True
            print("\nstopping; run the same command again to resume", flush=True)
    if child.returncode:
        raise SystemExit(130 if interrupted else child.returncode)


def sample(folder: Path) -> Path:
    """Sample the prompts with the shipped model; returns the path of the grid."""
    run("latentdiff", "sample", *PROMPTS, "--seed", "0", "--guidance", "3", "--output", folder)
    return folder / "grid.png"


def train(folder: Path) -> tuple[dict[int, float], Path]:
    """Train the recipe `demo`; returns validation losses by step, and the path of a before-and-after picture."""
    run(*LAUNCH, "--config", "demo", f"output={folder}")
    lines = map(json.loads, (folder / "train_latent/log.jsonl").read_text(encoding="utf-8").splitlines())
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    samples = folder / "train_latent/samples"
    first, last = min(losses), max(losses)
    sheet = beside(
        {f"before: loss {losses[first]:.3f}": samples / f"step-{first:08d}.png",
         f"after {last} steps: loss {losses[last]:.3f}": samples / f"step-{last:08d}.png"})  # fmt: skip
    sheet.save(folder / "before-and-after.png")
    return losses, folder / "before-and-after.png"


def beside(pictures: dict[str, Path]) -> Image.Image:
    """Arrange pictures in a row, each under its heading."""
    opened = [Image.open(path) for path in pictures.values()]
    width, height = max(image.width for image in opened), max(image.height for image in opened)
    sheet = Image.new("RGB", (width * len(opened), height + HEADING), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (heading, image) in enumerate(zip(pictures, opened, strict=True)):
        pen.text((number * width + 4, 3), heading, "black", font)
        sheet.paste(image, (number * width, HEADING))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    output = parser.parse_args().output.resolve()
    start = time.perf_counter()
    print("1. The model that ships with the package samples sixteen prompts.")
    grid = sample(output / "drawn")
    sampled = time.perf_counter()
    print(f"\n   {grid} ({sampled - start:.0f} s)")
    print(
        "\n2. The main part: UNet and BERT are trained from random weights on 2,496 captioned pictures. A few minutes\n"
        "   are enough for shapes and colors to appear, but not for following prompts. The model above took 7 on a GPU."
    )
    losses, sheet = train(output / "training")
    trained = time.perf_counter()
    first, last = min(losses), max(losses)
    print(f"""
Done in {trained - start:.0f} s. (The next run will skip training; to train again, delete {output}.)

  samples of the shipped model    {grid}
  training, before and after      {sheet}
  loss on held-out pictures       {losses[first]:.3f} before, {losses[last]:.3f} after {last} steps
  the model just trained          {output / "training/model"}

Next:
  source .venv/bin/activate
  latentdiff sample "a 3d emoji of a red heart" --model {output / "training"}
  latentdiff data check my-pictures                 # a folder of pictures, each with a .txt caption file
  latentdiff train --config emoji-64 data.source=my-pictures output=runs/mine
""")


if __name__ == "__main__":
    main()
