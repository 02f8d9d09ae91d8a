"""Figures with honest errors: intervals from random halves of the pictures, halved concept by concept.

A bootstrap would repeat pictures, and a picture that is its own neighbor breaks every figure of neighbors. Halves drawn
without replacement have no repetitions, and the variance of a figure over them is that of the figure itself (the
delete-d jackknife with d = n / 2; Shao & Wu 1989). Pictures of one concept are one observation.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

HALVES = 100
LEVEL, Z = 0.9, 1.6449  # of the intervals, and the quantile of the normal distribution
FEW = 16  # concepts; with fewer, the pictures of each are the observations, and the intervals are for these concepts


@dataclass(frozen=True)
class Halves:
    """Random halves of a set of real and a set of drawn pictures."""

    rows: list[tuple[Tensor, Tensor]]  # of real and of drawn pictures
    observations: int  # independent ones among the drawn pictures


@dataclass(frozen=True)
class Figure:
    """A figure with its 90 % interval."""

    name: str
    value: float
    low: float
    high: float
    half: float  # mean over halves: far from `value` if the figure still depends on the number of pictures
    real: int  # pictures
    drawn: int
    by_half: Tensor = field(repr=False, compare=False)  # (HALVES,)

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"

    def record(self) -> dict[str, Any]:
        """Return the figure for a JSON file."""
        return {name: value for name, value in vars(self).items() if name != "by_half"}


def halve(real: Sequence[Hashable], drawn: Sequence[Hashable], seed: int = 0) -> Halves:
    """Return random halves of two sets of pictures, given what each picture shows.

    A concept's pictures are in or out together, in both sets. Half of the concepts that both sets show are in, half of
    those that only one of them shows, and so on.
    """
    if len(set(drawn)) < FEW:
        real, drawn = range(len(real)), range(-len(drawn), 0)
    ids = {name: number for number, name in enumerate(dict.fromkeys([*real, *drawn]))}
    rows, columns = (np.array([ids[name] for name in names], dtype=int) for names in (real, drawn))
    kinds = np.zeros(len(ids), dtype=int)
    kinds[np.unique(rows)] += 1
    kinds[np.unique(columns)] += 2
    random, found = np.random.default_rng(seed), []
    for _ in range(HALVES):
        chosen = np.zeros(len(ids), dtype=bool)
        for kind in (1, 2, 3):
            members = random.permutation(np.flatnonzero(kinds == kind))
            chosen[members[: max(1, (len(members) + random.integers(2)) // 2)]] = True
        found.append(
            (torch.from_numpy(np.flatnonzero(chosen[rows])), torch.from_numpy(np.flatnonzero(chosen[columns])))
        )
    return Halves(found, len(set(drawn)))


def estimate(
    names: Sequence[str],
    statistic: Callable[[Tensor, Tensor], Tensor],
    halves: Halves,
    sizes: tuple[int, int],
    *,
    shares: Collection[str] = (),
) -> list[Figure]:
    """Compute figures on all pictures, and their intervals from halves.

    `statistic` maps rows of real and of drawn pictures to one value for each name; `sizes` are the numbers of pictures.
    `shares` names the figures that are shares: their intervals stay within 0 and 1, and do not vanish at either end.
    """
    values = statistic(*map(torch.arange, sizes)).double()
    by_half = torch.stack([statistic(*half).double() for half in halves.rows])
    return [
        _figure(name, float(value), column, sizes, halves.observations if name in shares else 0)
        for name, value, column in zip(names, values, by_half.T, strict=True)
    ]


def difference(figure: Figure, other: Figure) -> Figure:
    """Return how much larger `figure` is than `other`, of another model on the same prompts and halves."""
    sizes = (figure.real, figure.drawn)
    return _figure(figure.name, figure.value - other.value, figure.by_half - other.by_half, sizes, 0)


def wilson(share: float, error: float, most: int) -> tuple[float, float]:
    """Return Wilson's interval of a share: within 0 and 1, and not empty at either end.

    It has as many independent observations as the standard error shows, and not more than `most`.
    """
    count = min(most, share * (1.0 - share) / error**2) if error and 0.0 < share < 1.0 else most
    center, spread = share + Z**2 / (2 * count), Z * (share * (1 - share) / count + Z**2 / (4 * count**2)) ** 0.5
    low, high = ((center + sign * spread) / (1.0 + Z**2 / count) for sign in (-1, 1))
    return min(low, share), max(high, share)  # which rounding could leave out


def _figure(name: str, value: float, by_half: Tensor, sizes: tuple[int, int], most: int) -> Figure:
    error = float(by_half.std())
    low, high = wilson(value, error, most) if most else (value - Z * error, value + Z * error)
    return Figure(name, value, low, high, float(by_half.mean()), *sizes, by_half)
