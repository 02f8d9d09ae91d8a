"""What a caption is worth to a model: does it know which one belongs to a picture, and what does asking cost?

    python benchmarks/likelihood.py --model emoji-256 'data.source=pictures/emoji-256/*.parquet' \\
        --pictures 100 --worth 500

Of training and of held-out pictures: how often the own caption fits best among ten, the other nine of the same style
(chance 10 %, Wilson's 90 % interval), and what the own caption is worth, log p(z | caption) - log p(z | nothing), with
the bootstrap 90 % interval of the difference of the means. Seconds are wall-clock.
"""

from __future__ import annotations

import argparse
import re
import sys
import time

import numpy as np
import torch
from scipy.stats import binomtest

from latentdiff import LatentPipeline
from latentdiff.assets import EMOJI_STYLE
from latentdiff.data.cache import read_pixels
from latentdiff.data.sources import Source, open_source
from latentdiff.evaluation.evidence import Evidence, evidence
from latentdiff.evaluation.likelihood import measure_proposals
from latentdiff.sections import DataConfig

CANDIDATES = 10
PILOTS = 12  # training pictures that proposals are measured on
RANDOM = np.random.default_rng(0)


def spread(source: Source, count: int, offset: int = 0) -> list[int]:
    """Return indices spread evenly over a source, each once."""
    count = min(count, len(source))
    return [(index * len(source) // count + offset) % len(source) for index in range(count)]


def read(source: Source, indices: list[int], data: DataConfig) -> tuple[torch.Tensor, list[str]]:
    """Return pictures as levels (N, 3, H, W), and their captions."""
    levels = np.stack([read_pixels(source, index, data) for index in indices])
    return torch.from_numpy(levels).permute(0, 3, 1, 2), [source.captions(index)[0] for index in indices]


def candidates(own: str, pool: list[str], style: str) -> list[str]:
    """Return a caption and nine others of the same style."""
    match = re.search(style, own)
    same = sorted({text for text in pool if match and text.startswith(match.group()) and text != own})
    return [own, *RANDOM.choice(same or sorted(set(pool) - {own}), CANDIDATES - 1, replace=False)]


def report_matches(name: str, found: list[Evidence], seconds: float) -> None:
    """Print how often the first caption fits best."""
    right = sum(each.best == each.captions[0] for each in found)
    low, high = binomtest(right, len(found)).proportion_ci(0.9, "wilson")
    print(f"{name}: own caption best of ten in {right / len(found):.1%} ({low:.1%} - {high:.1%}) of {len(found)}; "
          f"{seconds / len(found):.1f} s a picture", flush=True)  # fmt: skip


def report_worth(training: np.ndarray, held_out: np.ndarray) -> None:
    """Print what captions are worth, and the difference with its interval."""
    for name, worth in (("training", training), ("held-out", held_out)):
        error = worth.std(ddof=1) / len(worth) ** 0.5
        print(f"{name}: the own caption is worth {worth.mean():+.0f} ± {error:.0f} nats, median "
              f"{np.median(worth):+.0f}, to {len(worth)} pictures")  # fmt: skip
    draws = [RANDOM.choice(training, len(training)).mean() - RANDOM.choice(held_out, len(held_out)).mean()
             for _ in range(2000)]  # fmt: skip
    low, high = np.quantile(draws, [0.05, 0.95])
    print(f"difference {training.mean() - held_out.mean():+.0f} ({low:+.0f} - {high:+.0f}) nats", flush=True)


def main() -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="data.source=... of the model's pictures")
    parser.add_argument("--model")
    parser.add_argument("--pictures", type=int, default=30, help="to choose among ten captions for")
    parser.add_argument("--worth", type=int, default=30, help="training pictures, and at most held-out ones")
    parser.add_argument("--timesteps", type=int, default=8)
    options = parser.parse_args()
    pipe = LatentPipeline.from_pretrained(options.model, dtype=torch.float32)
    data = DataConfig(source=options.source.removeprefix("data.source="), image_size=pipe.image_size, flip=False)
    sources = open_source(data)
    start = time.perf_counter()
    pilots = measure_proposals(pipe, *read(sources[0], spread(sources[0], PILOTS, offset=17), data)).captions
    assert pilots is not None
    print(f"proposals from {PILOTS} training pictures: {time.perf_counter() - start:.0f} s", flush=True)
    worth = []
    for name, source in zip(("training", "held-out"), sources, strict=True):
        pool = [captions[0] for captions in source.all_captions() if captions]
        levels, own = read(source, spread(source, options.pictures), data)
        start = time.perf_counter()
        asked = [candidates(text, pool, EMOJI_STYLE) for text in own]
        found = evidence(pipe, levels, asked, pilots, num_timesteps=options.timesteps)
        report_matches(name, found, time.perf_counter() - start)
        levels, own = read(source, spread(source, options.worth), data)
        found = evidence(pipe, levels, [[text] for text in own], pilots, num_timesteps=options.timesteps)
        worth.append(np.array([float(each.nats[0]) for each in found]))
    report_worth(*worth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
