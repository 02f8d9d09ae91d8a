"""Do 90 % intervals of evaluation figures cover the truth in 90 % of all draws?

    python benchmarks/coverage.py                # 500 draws of each case: about six minutes on one core

Two normal distributions in four dimensions, whose figures are known: the Fréchet distance in closed form, KID and the
figures of neighbors by the mean over many independent draws of the same size. "Independent": every picture shows a
concept of its own. "Clustered": four real and two drawn pictures show one concept each, which half of the drawn ones
share with real ones, and pictures of one concept are alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.evaluation.distances import Pairs, discrepancy, distance, frechet_distance, neighbors, polynomial
from latentdiff.evaluation.figures import estimate, halve
from latentdiff.evaluation.quality import NEIGHBORS

SIZE, SCALE, SHIFT, ALIKE = 4, 1.3, 0.4, 0.8  # dimensions; of the drawn pictures; standard deviation between concepts
SHARES = {*NEIGHBORS} - {"density"}
FRECHET = SIZE * (SHIFT**2 + (SCALE - 1) ** 2)


class Draw(NamedTuple):
    """Features of two sets of pictures, and which concepts they show."""

    real: Tensor
    drawn: Tensor
    concepts: Tensor  # of the real pictures
    asked: Tensor  # of the drawn ones


def independent(random: np.random.Generator, real: int, drawn: int) -> Draw:
    """Draw pictures that have nothing in common."""
    x, y = random.normal(size=(real, SIZE)), SHIFT + SCALE * random.normal(size=(drawn, SIZE))
    return Draw(torch.from_numpy(x), torch.from_numpy(y), torch.arange(real), torch.arange(real, real + drawn))


def clustered(random: np.random.Generator, real: int, drawn: int) -> Draw:
    """Draw four real pictures of a concept and two drawn ones; the marginal distributions are as above."""
    known, prompts = real // 4, drawn // 2
    concepts = np.repeat(np.arange(known), 4)
    shared = random.permutation(known)[: prompts // 2]
    asked = np.repeat(np.concatenate([shared, known + np.arange(prompts - len(shared))]), 2)
    centers = ALIKE * random.normal(size=(known + prompts, SIZE))
    around = (1 - ALIKE**2) ** 0.5
    x = centers[concepts] + around * random.normal(size=(real, SIZE))
    y = SHIFT + SCALE * (centers[asked] + around * random.normal(size=(drawn, SIZE)))
    return Draw(*map(torch.from_numpy, (x, y, concepts, asked)))


Statistic = Callable[[Tensor, Tensor], Tensor]  # of the figures, for rows of real and of drawn pictures


def frechet(draw: Draw) -> Statistic:
    return lambda rows, columns: torch.tensor([frechet_distance(draw.real[rows], draw.drawn[columns])])


def kernel(draw: Draw) -> Statistic:
    pairs = Pairs.of(polynomial, draw.real, draw.drawn)
    return lambda rows, columns: torch.tensor(
        [discrepancy(pairs.part(rows, columns), draw.concepts[rows], draw.asked[columns])]
    )


def crowd(draw: Draw) -> Statistic:
    pairs = Pairs.of(distance, draw.real, draw.drawn)
    return lambda rows, columns: neighbors(pairs.part(rows, columns))


# Figures, statistic, real and drawn pictures
KINDS = ((("Fréchet distance",), frechet, 2000, 2000), (("KID",), kernel, 304, 128), (NEIGHBORS, crowd, 128, 128))


def truth(make: Callable[..., Draw], statistic: Callable[[Draw], Statistic], real: int, drawn: int) -> Tensor:
    """Return the expectation of figures: in closed form, or by the mean of 2,000 draws."""
    if statistic is frechet:
        return torch.tensor([FRECHET])
    random, count = np.random.default_rng(1), 2000
    whole = torch.arange(real), torch.arange(drawn)
    if statistic is kernel:  # unbiased at any number of pictures, so large independent sets tell it best
        make, count, whole = independent, 20, (torch.arange(3000), torch.arange(3000))
    sizes = len(whole[0]), len(whole[1])
    return sum((statistic(make(random, *sizes))(*whole) for _ in range(count)), torch.zeros(1)) / count


def main() -> None:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500)
    draws = parser.parse_args().draws
    print("| figure | pictures | truth | mean of the draws | coverage, % |\n|---|---|---|---|---|")
    for names, statistic, real, drawn in KINDS:
        for make in (independent, clustered):
            expected, random, covered, values = truth(make, statistic, real, drawn), np.random.default_rng(0), [], []
            for seed in range(draws):
                draw = make(random, real, drawn)
                halves = halve(draw.concepts.tolist(), draw.asked.tolist(), seed)
                figures = estimate(names, statistic(draw), halves, (real, drawn), shares=SHARES & {*names})
                covered.append([each.low <= value <= each.high for each, value in zip(figures, expected, strict=True)])
                values.append([each.value for each in figures])
            means = expected.tolist(), np.mean(values, 0), 100 * np.mean(covered, 0)
            for name, value, mean, share in zip(names, *means, strict=True):
                case = f"{name}, {make.__name__} | {real} and {drawn}"
                print(f"| {case} | {value:.4f} | {mean:.4f} | {share:.1f} |", flush=True)


if __name__ == "__main__":
    main()
