"""What the likelihood of a model's pictures is good for: captions, swapped captions, strangers, and what it costs.

    python benchmarks/likelihood.py --model emoji-256 'data.source=pictures/emoji-256/*.parquet' --pictures 30

Of training and of held-out pictures: how often the own caption fits best among ten, the other nine of the same style
(chance 10 %, Wilson's 90 % interval), and what it is worth, log p(z | caption) - log p(z | nothing). Then how well
scores tell swapped captions from right ones, and strangers (white, discs, noise, blurred noise) from training pictures:
the area under the ROC curve with its bootstrap 90 % interval, raw bits per value beside it. Seconds are wall-clock.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from latentdiff import LatentPipeline
from latentdiff.assets import EMOJI_STYLE
from latentdiff.data.cache import read_pixels
from latentdiff.data.sources import Source, open_source
from latentdiff.evaluation.evidence import Evidence, evidence
from latentdiff.evaluation.likelihood import log_likelihood, measure_proposals
from latentdiff.evaluation.oddness import oddness
from latentdiff.sections import DataConfig

CANDIDATES = 10
RANDOM = np.random.default_rng(0)


def chosen(source: Source, data: DataConfig, count: int, offset: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Return pictures spread evenly over a source as levels (N, 3, H, W), and their captions."""
    indices = (np.linspace(0, len(source) - 1, count).round().astype(int) + offset) % len(source)
    levels = np.stack([read_pixels(source, int(index), data) for index in indices])
    return torch.from_numpy(levels).permute(0, 3, 1, 2), [source.captions(int(index))[0] for index in indices]


def candidates(own: str, pool: list[str], style: str) -> list[str]:
    """Return a caption and nine others of the same style."""
    match = re.search(style, own)
    same = sorted({text for text in pool if match and text.startswith(match.group()) and text != own})
    return [own, *RANDOM.choice(same or sorted(set(pool) - {own}), CANDIDATES - 1, replace=False)]


def wilson(right: int, count: int, z: float = 1.645) -> tuple[float, float]:
    """Return Wilson's interval of a share."""
    share, denominator = right / count, 1 + z * z / count
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - half) / denominator, (middle + half) / denominator


def area(positive: np.ndarray, negative: np.ndarray) -> str:
    """Return the area under the ROC curve of scores, with a bootstrap interval."""

    def auc(a: np.ndarray, b: np.ndarray) -> float:
        return float((a[:, None] > b).mean() + 0.5 * (a[:, None] == b).mean())

    draws = [auc(RANDOM.choice(positive, len(positive)), RANDOM.choice(negative, len(negative))) for _ in range(500)]
    low, high = np.quantile(draws, [0.05, 0.95])
    return f"{auc(positive, negative):.3f} ({low:.3f} - {high:.3f})"


def strangers(count: int, size: int) -> torch.Tensor:
    """Return pictures that are no emoji: white, discs, noise, blurred noise."""
    made = []
    for number in range(count):
        image = Image.new("RGB", (size, size), "white")
        if number % 4 == 1:
            corner, far = sorted(RANDOM.integers(0, size, 2).tolist())
            color = tuple(RANDOM.integers(0, 256, 3).tolist())
            ImageDraw.Draw(image).ellipse((corner, corner, far + 1, far + 1), fill=color)
        elif number % 4 >= 2:
            image = Image.fromarray(RANDOM.integers(0, 256, (size, size, 3), dtype=np.uint8))
            image = image.filter(ImageFilter.GaussianBlur(8)) if number % 4 == 3 else image
        made.append(np.asarray(image))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


def report(name: str, found: list[Evidence]) -> None:
    """Print how often the first caption fits best, and what it is worth."""
    right = sum(each.best == each.captions[0] for each in found)
    worth = torch.stack([each.nats[0] for each in found])
    low, high = wilson(right, len(found))
    print(f"{name}: own caption best of ten in {right / len(found):.0%} ({low:.0%} - {high:.0%}) of {len(found)}, "
          f"worth {worth.mean():+.0f} ± {worth.std() / len(worth) ** 0.5:.0f} nats", flush=True)  # fmt: skip


def main() -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="data.source=... of the model's pictures")
    parser.add_argument("--model")
    parser.add_argument("--pictures", type=int, default=30)
    parser.add_argument("--timesteps", type=int, default=8)
    options = parser.parse_args()
    pipe = LatentPipeline.from_pretrained(options.model, dtype=torch.float32)
    data = DataConfig(source=options.source.removeprefix("data.source="), image_size=pipe.image_size, flip=False)
    sources = open_source(data)
    pools = [[captions[0] for captions in source.all_captions() if captions] for source in sources]
    start = time.perf_counter()
    pilots = measure_proposals(pipe, *chosen(sources[0], data, 12, offset=17))
    assert pilots.captions is not None
    print(f"proposals from 12 training pictures: {time.perf_counter() - start:.0f} s", flush=True)
    levels: dict[str, torch.Tensor] = {}
    for name, source, pool in zip(("training", "held-out"), sources, pools, strict=True):
        levels[name], own = chosen(source, data, options.pictures)
        start = time.perf_counter()
        report(f"{name} pictures", evidence(pipe, levels[name], [candidates(text, pool, EMOJI_STYLE) for text in own],
                                            pilots.captions, num_timesteps=options.timesteps))  # fmt: skip
        print(f"  {(time.perf_counter() - start) / options.pictures:.1f} s a picture", flush=True)
    training, own = chosen(sources[0], data, options.pictures)
    swapped = own[len(own) // 2 :] + own[: len(own) // 2]
    worth = [np.array([float(each.nats[0]) for each in evidence(pipe, training, [[text] for text in texts],
                       pilots.captions, num_timesteps=options.timesteps)]) for texts in (own, swapped)]  # fmt: skip
    print(f"swapped captions, by what the caption is worth: area {area(-worth[1], -worth[0])}", flush=True)
    start = time.perf_counter()
    count = max(8, options.pictures // 3)
    everything = torch.cat([training, strangers(count, pipe.image_size)])
    bounds = log_likelihood(pipe, everything, [""] * len(everything), pilots.bound, draws=4, posterior_floor=0.03)
    bits = torch.tensor([each.bits_per_dimension for each in bounds])
    png = torch.tensor([each.png / math.log(2) / each.dimensions for each in bounds])
    odd = oddness(bits, png).numpy()
    for name, score in (("raw bits per value", bits.numpy()), ("oddness", odd)):
        print(f"strangers, by {name}: area {area(score[len(training) :], score[: len(training)])}")
    error = np.mean([each.standard_error / math.log(2) / each.dimensions for each in bounds[: len(training)]])
    print(f"training pictures: {bits[: len(training)].mean():.3f} bits per value, standard error of one {error:.4f} at "
          f"4 draws; {(time.perf_counter() - start) / len(everything):.1f} s a picture")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
