"""Does a negative prompt keep a model from drawing what it remembers, when it is asked for a new combination?

    python benchmarks/new_combinations.py 'data.source=pictures/emoji-256/*.parquet'

A caption of a held-out picture asks for a known thing in a style that training never showed it in; a model that copies
draws it in another style. So the negative prompt asks for the same thing in the style that it is most easily confused
with: of those that training shows it in, the one whose pictures are nearest to those of the wanted style, in the median
over all things with both. Prints these distances, and how often the nearest of all pictures, held-out ones among them,
shows what was asked for. Encodings are kept in `--output`, where the first pictures are shown, too.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff import LatentPipeline
from latentdiff.assets import EMOJI_STYLE
from latentdiff.cli.memory import keep_freed_memory
from latentdiff.data.cache import read_pixels
from latentdiff.data.sources import open_source
from latentdiff.evaluation.combinations import attributes_of, concepts_of, new_combinations
from latentdiff.evaluation.concepts import agreement
from latentdiff.evaluation.evaluate import ENCODED, MAX_HELD_OUT, MAX_TRAINING
from latentdiff.evaluation.gallery import LATENTS, embed, read_pictures
from latentdiff.evaluation.grid import picture_grid
from latentdiff.sections import DataConfig

ARMS = (("none", 3.0), ("the confusable style", 2.0), ("the confusable style", 3.0))  # negative prompt, guidance
SHOWN = 8  # pictures in the grid: held-out ones, and below them what each arm draws

Shown = list[tuple[str, str]]  # thing and style of each picture
Distances = dict[tuple[str, str], float]  # between the pictures of a thing in two styles


def sibling_distances(shown: Shown, latents: Tensor) -> Distances:
    """Return the median root mean square difference of latents (N, c, h, w) of the same thing, for pairs of styles."""
    rows, apart = {pair: row for row, pair in enumerate(shown)}, {}
    vectors = latents.flatten(1).float()
    for one, other in combinations(sorted({style for _, style in shown}), 2):
        pairs = [(row, rows[thing, other]) for (thing, style), row in rows.items()
                 if style == one and (thing, other) in rows]  # fmt: skip
        each = [float((vectors[a] - vectors[b]).square().mean().sqrt()) for a, b in pairs]
        apart[one, other] = apart[other, one] = median(each) if each else math.inf
    return apart


def print_distances(apart: Distances) -> None:
    """Print a table of distances between styles."""
    styles = sorted({style for style, _ in apart})
    print("\n| | " + " | ".join(styles) + " |\n|---|" + "---|" * len(styles))
    for one in styles:
        print(f"| {one} | " + " | ".join(f"{apart[one, other]:.2f}" if other != one else "" for other in styles) + " |")


def share(right: Tensor) -> str:
    """Return a share of samples (N,) with its standard error."""
    values = right.double()
    return f"{float(values.mean()):.1%} ± {float(values.std()) / len(values) ** 0.5:.1%}"


def main() -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="data.source=... of the model's pictures")
    parser.add_argument("--model")
    parser.add_argument("--style", default=EMOJI_STYLE, help="regular expression of the part that names the style")
    parser.add_argument("--output", type=Path, default=Path("outputs/new-combinations"))
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    pipe, encoded = LatentPipeline.from_pretrained(options.model), options.output / ENCODED
    keep_freed_memory(pipe.device)
    size = pipe.image_size
    data = DataConfig(source=options.source.removeprefix("data.source="), image_size=size, flip=False)
    sources = train, held_out = open_source(data)
    gallery = embed(pipe.vae, read_pictures(train, data, MAX_TRAINING, []), size, folder=encoded)
    others = embed(pipe.vae, read_pictures(held_out, data, MAX_HELD_OUT, []), size, reconstruct=True, folder=encoded)
    shows = [list(zip(concepts_of(each, options.style), attributes_of(each, options.style), strict=True))
             for each in sources]  # fmt: skip
    trained = [shows[0][index] for index in gallery.indices]
    apart = sibling_distances(trained, gallery.latents)
    print(f"{next(pipe.vae.parameters()).dtype}; a held-out picture and its reconstruction are "
          f"{float(others.quality[2].median()):.3f} apart, the same thing in two styles:")  # fmt: skip
    print_distances(apart)

    styles_of: dict[str, list[str]] = {}  # in which training shows a thing
    for thing, style in trained:
        styles_of.setdefault(thing, []).append(style)
    readable = set(others.indices)
    chosen = [index for index in new_combinations(train, held_out, options.style)
              if index in readable and shows[1][index][0] in styles_of]  # fmt: skip
    captions, negatives = [held_out.captions(index)[0] for index in chosen], []
    for index, caption in zip(chosen, captions, strict=True):
        thing, wanted = shows[1][index]
        nearest = min(sorted(styles_of[thing]), key=lambda style: apart[wanted, style])
        negatives.append(caption.replace(wanted, nearest, 1))
    print(f"\n{len(chosen)} new combinations, such as {captions[0]!r} with the negative prompt {negatives[0]!r}\n")
    by_style = {style: [row for row, index in enumerate(chosen) if shows[1][index][1] == style]
                for style in sorted({style for _, style in trained})}  # fmt: skip
    print("| negative prompt | guidance | the thing | the style | both | the style, for each that is asked for |\n"
          "|---|---|---|---|---|---|", flush=True)  # fmt: skip
    pictures = torch.cat([gallery.latents, others.latents]).flatten(1)
    shown = [*trained, *(shows[1][index] for index in others.indices)]
    labels = ["held-out pictures"]
    sheet = [[Image.fromarray(read_pixels(held_out, index, data)) for index in chosen[:SHOWN]]]
    for name, guidance in ARMS:
        images = list(pipe.draw(captions, negative_prompt="" if name == "none" else negatives, guidance_scale=guidance,
                                num_steps=options.steps, seed=list(range(len(chosen)))))  # fmt: skip
        sheet.append(images[:SHOWN])
        queries = embed(pipe.vae, enumerate(map(np.asarray, images)), size).latents.flatten(1)
        thing, style = (agreement(LATENTS, queries, pictures, [shows[1][index][part] for index in chosen],
                                  [pair[part] for pair in shown], captions)[1] == 0 for part in (0, 1))  # fmt: skip
        each = ", ".join(f"{asked!r} {int(style[rows].sum())} of {len(rows)}" for asked, rows in by_style.items())
        cells = [name, f"{guidance:g}", share(thing), share(style), share(thing & style), each]
        print("| " + " | ".join(cells) + " |", flush=True)
        labels.append(f"negative prompt: {name}; guidance {guidance:g}")
        grid = picture_grid(sheet, row_labels=labels, captions=[captions[:SHOWN]] * len(sheet))
        grid.save(options.output / "combinations.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
