"""What else a trained model can do: invert pictures to noise, interpolate, exaggerate a feature. One sheet.

python examples/representation.py --model runs/emoji-64 --output outputs/representation.png
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from PIL import Image

from latentdiff import LatentPipeline
from latentdiff.config import load_config
from latentdiff.data.pictures import open_picture
from latentdiff.data.sources import open_source
from latentdiff.evaluation.grid import picture_grid

FACE, GLASSES = "a noto emoji of a grinning face", "a noto emoji of a smiling face with sunglasses"
AMOUNTS = (-2.0, 0.0, 1.0, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=None, help="model, as for LatentPipeline.from_pretrained")
    parser.add_argument("--config", default="emoji-64", help="recipe whose training pictures to use")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("outputs/representation.png"))
    options = parser.parse_args()
    pipe = LatentPipeline.from_pretrained(options.model, dtype=torch.float32)
    data = load_config(options.config).data
    source = open_source(data)[0]
    chosen = range(0, len(source), max(1, len(source) // options.pictures))[: options.pictures]
    pictures = [
        open_picture(source.read(index), max_pixels=data.max_pixels, background=data.background) for index in chosen
    ]
    captions = [source.captions(index)[0] for index in chosen]

    found = [pipe.invert(picture, caption, num_steps=options.steps)
             for picture, caption in zip(pictures, captions, strict=True)]  # fmt: skip
    size = (pipe.image_size, pipe.image_size)
    print(f"{len(found)} training pictures, ddim, {options.steps} steps, guidance 1")
    for caption, one in zip(captions, found, strict=True):
        print(f"  {one.psnr:5.2f} dB from its inversion, {one.vae_psnr:5.2f} dB by the VAE alone, std of the noise "
              f"{float(one.latents.std()):.3f}: {caption}")  # fmt: skip
    lost = [one.vae_psnr - one.psnr for one in found]
    print(f"lost by inversion: mean {statistics.mean(lost):.2f} dB, at most {max(lost):.2f} dB")

    rows = [
        [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures],
        [one.image for one in found],
        pipe.interpolate((pictures[0], captions[0]), (pictures[-1], captions[-1]), 8, num_steps=50),
        pipe.interpolate("a 3d emoji of a red apple", "a noto emoji of a black cat", 8, seed=[0, 1]),
        [pipe.exaggerate(FACE, GLASSES, amount, seed=3)[0] for amount in AMOUNTS],
    ]  # fmt: skip
    labels = ("training pictures", "drawn from the noise that inversion finds", "between two of them",
              "between two prompts", f"a grinning face, with sunglasses times {AMOUNTS}")  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(rows, row_labels=labels).save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
