"""Cost of loading a batch from datasets of 1,000 and 100,000 pictures; it should not depend on their size.

    python benchmarks/data_scale.py

Uses shards of synthetic moments of 32x32x4 latents, one caption each; batches are sampled from all of them.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.config import load_config
from latentdiff.data.batches import LatentBatches
from latentdiff.data.order import BatchPlan
from latentdiff.data.shards import Arrays, Progress, Shards, SingleProcess
from text_encoder import TextEncoder, TextEncoderConfig, train_tokenizer

SHAPE, BATCH, STEPS = (4, 32, 32), 64, 100


def moments(ranges: Sequence[range], progress: Progress) -> Iterator[Arrays]:
    """Yield random moments, original and mirrored."""
    for rows in ranges:
        random = np.random.default_rng(rows.start)
        values = random.standard_normal((len(rows), 2, 2 * SHAPE[0], *SHAPE[1:]), np.float32)
        yield {"moments": values.astype(np.float16)}


class Cache:
    """The part of LatentCache that LatentBatches uses, without a VAE."""

    def __init__(self, folder: Path, size: int) -> None:
        self.shards = Shards(folder, {"rows": size}, size)
        self.shards.build(moments, SingleProcess())
        self.good = np.ones(size, dtype=bool)

    def moments(self, index: int, flip: bool) -> tuple[Any, Any]:
        """Return mean and log-variance."""
        mean, logvar = np.split(self.shards["moments", index][int(flip)].astype(np.float32), 2)
        return mean, logvar


class Captions:
    """The part of Source that LatentBatches uses."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def captions(self, index: int) -> list[str]:
        """Return one caption."""
        return [f"picture number {index}"]


def measure(size: int, folder: Path, encoder: TextEncoder) -> None:
    """Print the milliseconds per batch, and how much the process grew."""
    cache: Any = Cache(folder, size)
    source: Any = Captions(size)
    plan = BatchPlan(BATCH)
    batches = LatentBatches(source, load_config("emoji-256").data, plan, 0, SHAPE, num_timesteps=1000,
                            caption_dropout=0.1, latents=cache, text=encoder)  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for step in range(STEPS):
        start = time.perf_counter()
        batches[step]
        times.append(time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{size:7d} pictures: {1000 * np.median(times):.2f} ms per batch of {BATCH} (95 % below "
          f"{1000 * np.quantile(times, 0.95):.2f}), process grew by {grown:.0f} MiB of mapped pages")  # fmt: skip


def main() -> None:
    tokenizer = train_tokenizer(["picture number 0 1 2 3 4 5 6 7 8 9"] * 2, vocab_size=100, max_length=32)
    encoder = TextEncoder.new(TextEncoderConfig(16, 1, 2), tokenizer)
    for size in (1_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            measure(size, Path(folder), encoder)


if __name__ == "__main__":
    main()
