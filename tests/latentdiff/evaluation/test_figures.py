"""Intervals from halves hold what they promise: they cover the true value in about 90 % of all draws."""

import numpy as np
import pytest
import torch

from latentdiff.evaluation.distances import frechet_distance
from latentdiff.evaluation.figures import difference, estimate, halve


@pytest.mark.parametrize("together", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_intervals_cover_a_known_frechet_distance(together):
    """Two Gaussians; also if four pictures each show one concept, where intervals for single pictures are too short."""
    random, truth, covered, alone = np.random.default_rng(0), 2 * 0.5**2 + 2 * 0.4**2, 0, 0
    for seed in range(60):
        centers = [random.normal(size=(400 // together, 2)).repeat(together, 0) for _ in range(2)]
        spread = 0.8 if together > 1 else 0.0
        x, y = (spread * c + (1 - spread**2) ** 0.5 * random.normal(size=(400, 2)) for c in centers)
        x, y = torch.from_numpy(x), torch.from_numpy(0.5 + 1.4 * y)
        for concepts in {together, 1}:
            names = [[f"{which}{row // concepts}" for row in range(400)] for which in "xy"]
            statistic = lambda rows, columns, x=x, y=y: torch.tensor([frechet_distance(x[rows], y[columns])])  # noqa: E731
            (figure,) = estimate(["distance"], statistic, halve(*names, seed), (400, 400))
            hit = figure.low <= truth <= figure.high
            covered += hit and concepts == together
            alone += hit and concepts == 1
    assert 48 <= covered <= 60  # binomial: 54 on average, outside of this once in 100
    assert together == 1 or alone < 46


def test_halves_keep_concepts_together():
    real, drawn = [f"c{row // 3}" for row in range(90)], [f"c{row // 2}" for row in range(80)]
    halves = halve(real, drawn)
    assert halves.observations == 40
    for rows, columns in halves.rows:
        kept = {real[row] for row in rows}, {drawn[column] for column in columns}
        assert len(rows) == 3 * len(kept[0])
        assert len(columns) == 2 * len(kept[1]) == 40
        assert kept[0] == {each for each in kept[1] if each in real}
    assert halve(real, drawn).rows[7][0].equal(halves.rows[7][0])


def test_a_few_concepts_are_taken_as_they_are():
    """With two classes, half of the concepts would be one class: pictures are the observations."""
    (rows, columns), *_ = halve(["cat", "dog"] * 50, ["cat", "dog"] * 20).rows
    assert (len(rows), len(columns)) == (50, 20)
    assert 0 < (columns % 2).sum() < 20


def test_shares_stay_shares():
    """The interval of 100 % does not vanish, and none leaves 0 to 1."""
    concepts = list(range(50))
    for right in (50, 49, 0):
        values = (torch.arange(50) < right).double()
        (figure,) = estimate(["right"], lambda _, columns, v=values: v[columns].mean()[None], halve((), concepts),
                             (0, 50), shares=["right"])  # fmt: skip
        assert 0.0 <= figure.low <= figure.value <= figure.high <= 1.0
        assert figure.high - figure.low > 0.02


def test_differences_are_paired():
    """What two models share cancels: the interval of their difference is far shorter than their own."""
    hard, concepts = torch.randn(60, dtype=torch.float64), list(range(60))
    figures = [
        estimate(["score"], lambda _, columns, v=hard + shift: v[columns].mean()[None], halve((), concepts), (0, 60))[0]
        for shift in (0.1 + 0.01 * torch.randn(60, dtype=torch.float64), torch.zeros(60, dtype=torch.float64))
    ]
    found = difference(*figures)
    assert 0.0 < found.low < 0.1 < found.high + 0.01
    assert found.high - found.low < 0.1 * (figures[0].high - figures[0].low)
