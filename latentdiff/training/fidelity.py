"""Do samples show what was asked for? Measured while a model is trained, in a small share of the time.

Latents are sampled for captions of training pictures; the training picture with the nearest latents should have that
caption. `latentdiff evaluate` measures more, and of the decoded pictures.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..data.cache import LatentCache
from ..data.sources import Source
from ..errors import LatentDiffError
from ..evaluation.concepts import choose, concepts_of, ranks
from ..sampling.prompts import literal
from .budget import OutOfTime
from .launch import Launch

SHARE = 0.03  # of the time since the launch
MOST, CROWD = 64, 2_000  # pictures to sample, and training pictures to compare them with
TOGETHER = 8  # pictures that are sampled at once, and the fewest that say something


class Fidelity:
    """What is asked for, the same each time, and the time that asking has taken."""

    def __init__(self, run: Launch, source: Source, cache: LatentCache | None) -> None:
        """Choose the captions; raise LatentDiffError if there are no cached latents, or just one caption."""
        self.every = every = run.config.train_latent.evaluate_every
        if cache is None:
            raise LatentDiffError(f"train_latent.evaluate_every={every}: needs train_latent.cache=true")
        self.run, self.begin, self.spent = run, run.clock.elapsed(), 0.0
        self.last = 0  # step of the last evaluation
        captions, seed = concepts_of(source), run.config.seed
        if len(set(captions) - {""}) < 2:
            raise LatentDiffError(f"train_latent.evaluate_every={every}: needs pictures with different captions")
        shown = np.random.default_rng(seed).permutation(np.flatnonzero(cache.good))[:CROWD].tolist()
        numbers = {text: number for number, text in enumerate(dict.fromkeys(captions))}
        rows = choose([captions[index] for index in shown], MOST, seed)
        asked = [captions[shown[row]] for row in rows]
        self.prompts = list(map(literal, asked))
        self.requested = torch.tensor([numbers[text] for text in asked])
        self.shown = torch.tensor([numbers[captions[index]] for index in shown])
        self.latents = torch.stack([torch.from_numpy(cache.moments(index, False)[0]).flatten() for index in shown])

    def is_due(self, step: int) -> bool:
        """Whether a multiple of `every` has been reached since the last evaluation."""
        return step // self.every > self.last // self.every

    def measure(
        self, step: int, seconds_each: float, sample: Callable[[Sequence[str], int], Tensor]
    ) -> dict[str, float]:
        """Sample as many pictures as the share of the time allows, and return the share that is as asked; {} if none.

        `seconds_each` is what a picture takes; `sample` returns latents (B, c, h, w) for prompts, the first of which
        has a place among all; it is collective, and so is this.
        """
        before = self.run.clock.elapsed()
        allowed = SHARE * (before - self.begin) - self.spent
        count = min(len(self.prompts), int(max(0.0, allowed) / max(seconds_each, 1e-9)) // TOGETHER * TOGETHER)
        if self.run.accelerator.num_processes > 1:
            (count,) = broadcast_object_list([count])
        if not count:
            self.run.report(f"train_latent {step}: evaluation skipped, as {TOGETHER} samples take about "
                            f"{TOGETHER * seconds_each:.0f} s, more than {SHARE:.0%} of the time so far")  # fmt: skip
            return {}
        self.last = step
        parts = ((self.prompts[start : min(start + TOGETHER, count)], start) for start in range(0, count, TOGETHER))
        try:
            found = torch.cat([sample(*part) for part in parts])
        except OutOfTime:  # in all processes alike; the rest of the validation is not lost
            self.run.report(f"train_latent {step}: evaluation stopped, as no time is left in the budget")
            return {}
        rank, _ = ranks(found.flatten(1).float().cpu(), self.latents, self.requested[:count], self.shown)
        self.spent += self.run.clock.elapsed() - before
        return {"right_captions": float((rank == 0).double().mean()), "right_captions_of": float(count)}
