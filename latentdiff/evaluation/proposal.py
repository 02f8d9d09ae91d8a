"""Which timesteps to take when the bound's sum over all of them is estimated from a few."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LatentDiffError
from ..files.tensors import read_json

FILE = "likelihood.json"  # beside a model
# Pictures that the model has not learned by heart have large terms where those it was measured on have none. A uniform
# share bounds their weights (a defensive mixture: Hesterberg 1995, doi 10.1080/00401706.1995.10484303).
UNIFORM = 0.25


@dataclass(frozen=True)
class Proposal:
    """Probabilities of the timesteps 1 ... T-1."""

    probabilities: Tensor  # (T - 1,) float64, of sum 1

    @classmethod
    def measured(cls, t: Tensor, terms: Tensor, num_timesteps: int) -> "Proposal":
        """Make probabilities in proportion to the root mean square of L_t, but for a uniform share.

        In proportion alone, they would give the least variance for the pictures they were measured on. t (n,) are
        timesteps, at least 1, and terms (n, N) their L_t for some pictures. Between them log L_t is interpolated over
        log t.
        """
        if len(t) < 2 or int(t.min()) < 1 or int(t.max()) >= num_timesteps:
            raise LatentDiffError(f"timesteps {t.tolist()}: expected several from 1 to {num_timesteps - 1}")
        order = t.argsort()
        known, values = t[order].double().log(), terms[order].double().square().mean(1).sqrt().clamp(min=1e-30).log()
        wanted = torch.arange(1, num_timesteps, dtype=torch.float64).log()
        right = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
        share = ((wanted - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
        rms = torch.lerp(values[right - 1], values[right], share).exp()
        return cls((1 - UNIFORM) * rms / rms.sum() + UNIFORM / len(rms))


class Proposals(NamedTuple):
    """What a model's estimates take their timesteps from."""

    bound: Proposal  # for the bound itself
    captions: Proposal | None  # for what a caption changes in it; None if they were measured without captions

    def write(self, folder: Path) -> None:
        """Keep them beside a model, if its folder can be written and both are there."""
        if self.captions is None:
            return
        values = {name: each.probabilities.tolist() for name, each in self._asdict().items()}
        with suppress(OSError):
            (folder / FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, num_timesteps: int) -> "Proposals | None":
        """Return what `write` kept for a model with T timesteps; None if there is nothing.

        Raises LatentDiffError if it is of another model, or of a version without the uniform share.
        """
        if not (folder / FILE).is_file():
            return None
        least = 0.999 * UNIFORM / (num_timesteps - 1)
        found = read_json(folder / FILE, "")
        try:
            tensors = [torch.tensor(found[name], dtype=torch.float64) for name in cls._fields]
        except (KeyError, TypeError, ValueError):
            tensors = []
        if not tensors or any(each.shape != (num_timesteps - 1,) or not bool((each > least).all()) for each in tensors):
            raise LatentDiffError(f"{folder / FILE}: is of another model, or of a version whose intervals were too "
                                  "short; delete it, and it will be measured again")  # fmt: skip
        return cls(*(Proposal(each / each.sum()) for each in tensors))


def stratified(proposal: Proposal, count: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` timesteps, one from each of as many equally probable parts; return them and their weights.

    The weighted sum of terms is an unbiased estimate of the sum over all timesteps from 1 on; None takes each once.
    """
    probabilities = proposal.probabilities
    if count is None:
        return torch.arange(1, len(probabilities) + 1), torch.ones_like(probabilities)
    uniform = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    index = torch.searchsorted(probabilities.cumsum(0), uniform).clamp(max=len(probabilities) - 1)
    return index + 1, 1 / (count * probabilities[index])


def grid(num_timesteps: int, count: int) -> Tensor:
    """Return about `count` timesteps from 1 to T-1, evenly spaced in their logarithm, each once."""
    points = torch.logspace(0, torch.tensor(float(num_timesteps - 1)).log10().item(), count, dtype=torch.float64)
    return torch.unique(points.round().long().clamp(1, num_timesteps - 1))
