"""Which pictures of a folder have a wrong caption, and which do not belong there? Scores compared.

    python benchmarks/likelihood_wrong.py --model emoji-256 'data.source=pictures/emoji-256/*.parquet' \\
        --strangers photographs --pictures 200

Of 200 training pictures 20 get each other's captions, and 20 strangers are added: white, discs, and photographs from a
folder (scikit-image and scikit-learn bring such). For each score the area under the ROC curve with its bootstrap 90 %
interval. Rows are written to `--output` as they are found, and read from there by a second run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from likelihood import PILOTS, RANDOM, read, spread
from PIL import Image, ImageDraw, ImageOps

from latentdiff import LatentPipeline
from latentdiff.data.sources import open_source
from latentdiff.evaluation.evidence import evidence
from latentdiff.evaluation.likelihood import Bound, log_likelihood, measure_proposals
from latentdiff.evaluation.oddness import ODD, oddness
from latentdiff.sections import DataConfig

SHARE = 10  # one in ten has a wrong caption, and as many are strangers


def area(positive: np.ndarray, negative: np.ndarray) -> str:
    """Return the area under the ROC curve of scores, with a bootstrap interval."""

    def auc(a: np.ndarray, b: np.ndarray) -> float:
        return float((a[:, None] > b).mean() + 0.5 * (a[:, None] == b).mean())

    draws = [auc(RANDOM.choice(positive, len(positive)), RANDOM.choice(negative, len(negative))) for _ in range(500)]
    low, high = np.quantile(draws, [0.05, 0.95])
    return f"{auc(positive, negative):.3f} ({low:.3f} - {high:.3f})"


def strangers(count: int, size: int, folder: Path) -> list[torch.Tensor]:
    """Return pictures that are no emoji, (3, H, W) each: one white, discs, and photographs for half of them."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
    made = []
    for number in range(count):
        image = Image.new("RGB", (size, size), "white")
        if number % 2:
            with Image.open(files[number // 2 * len(files) // (count // 2)]) as photograph:
                image = ImageOps.fit(photograph.convert("RGB"), (size, size))
        elif number:
            left, top, width = RANDOM.integers(0, size // 2, 3).tolist()
            color = tuple(RANDOM.integers(0, 256, 3).tolist())
            ImageDraw.Draw(image).ellipse((left, top, left + width + 16, top + width + 16), fill=color)
        made.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return made


def parts(bound: Bound) -> dict[str, float]:
    """Return what scores are made of."""
    return {"decoder": bound.decoder, "entropy": bound.entropy, "kl": bound.kl, "first": bound.first,
            "bits": bound.bits_per_dimension, "png": bound.png / math.log(2) / bound.dimensions}  # fmt: skip


def main() -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="data.source=... of the model's pictures")
    parser.add_argument("--model")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--strangers", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--output", type=Path, default=Path("outputs/likelihood-rows.json"))
    options = parser.parse_args()
    pipe = LatentPipeline.from_pretrained(options.model, dtype=torch.float32)
    data = DataConfig(source=options.source.removeprefix("data.source="), image_size=pipe.image_size, flip=False)
    source = open_source(data)[0]
    indices = spread(source, options.pictures)
    captions = [source.captions(index)[0] for index in indices]
    wrong = np.sort(RANDOM.choice(len(indices), len(indices) // SHARE, replace=False))
    asked = list(captions)
    for here, there in zip(wrong, np.roll(wrong, 1), strict=True):
        asked[here] = captions[there]
    odd = strangers(len(wrong), pipe.image_size, options.strangers)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(options.output.read_text()) if options.output.is_file() else []
    left = range(len(rows), len(indices) + len(odd))
    if left:
        bounds, worth = measure_proposals(pipe, *read(source, spread(source, PILOTS, offset=17), data))
        assert worth is not None
    for number in left:
        known = number < len(indices)
        levels = read(source, [indices[number]], data)[0] if known else odd[number - len(indices)][None]
        (bound,) = log_likelihood(pipe, levels, [""], bounds, draws=1, seed=number)
        nats = float(evidence(pipe, levels, [[asked[number]]], worth, seed=number)[0].nats[0]) if known else 0.0
        rows.append({"stranger": not known, "swapped": known and number in wrong, **parts(bound), "worth": nats,
                     "asked": bound.bits_per_dimension - nats / math.log(2) / bound.dimensions})  # fmt: skip
        options.output.write_text(json.dumps(rows))
        print(f"\r{number + 1} of {len(indices) + len(odd)}", end="", file=sys.stderr, flush=True)
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    right, swapped, strange = (column["stranger"] == a for a in (False, False, True))
    swapped = swapped & column["swapped"]
    right = right & ~column["swapped"]
    for name, score in (("what the caption is worth", -column["worth"]), ("raw bits per value", column["asked"])):
        print(f"swapped captions, by {name}: {area(score[swapped], score[right])}")
    print(f"a caption is worth {column['worth'][right].mean():+.0f} nats, another picture's "
          f"{column['worth'][swapped].mean():+.0f}")  # fmt: skip
    odd_by = oddness(torch.from_numpy(column["bits"]), torch.from_numpy(column["png"])).numpy()
    for name, score in (("oddness", odd_by), ("raw bits per value", column["bits"])):
        print(f"strangers, by {name}: {area(score[strange], score[~strange])}")
    named = (odd_by > ODD)[strange].mean(), (odd_by > ODD)[~strange].mean()
    print(f"oddness above {ODD}: {named[0]:.0%} of the strangers, {named[1]:.0%} of the others")
    return 0


if __name__ == "__main__":
    sys.exit(main())
