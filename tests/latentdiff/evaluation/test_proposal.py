"""Timesteps in proportion to what they are worth: unbiased sums, and intervals that hold."""

import numpy as np
import pytest
import torch

from latentdiff import LatentDiffError
from latentdiff.evaluation.likelihood import Bound
from latentdiff.evaluation.proposal import UNIFORM, Proposal, grid, stratified


def test_proposals():
    t = torch.tensor([1, 10, 99])
    proposal = Proposal.measured(t, torch.tensor([[100.0, 100], [10, 10], [1, 1]]), 100)
    assert proposal.probabilities.shape == (99,)
    assert proposal.probabilities.sum() == pytest.approx(1)
    measured = proposal.probabilities - UNIFORM / 99
    assert measured[0] / measured[9] == pytest.approx(10)
    assert measured.sum() == pytest.approx(1 - UNIFORM)
    times, weights = stratified(proposal, None, torch.Generator())
    assert times.tolist() == list(range(1, 100))
    assert weights.unique().tolist() == [1.0]
    generator, values = torch.Generator().manual_seed(0), 100 / torch.arange(1, 100).double()
    means = []
    for _ in range(2000):
        times, weights = stratified(proposal, 4, generator)
        means.append((weights * values[times - 1]).sum())
    means = torch.stack(means)
    assert abs(means.mean() - values.sum()) < 4 * means.std() / len(means) ** 0.5
    with pytest.raises(LatentDiffError, match="expected several from 1 to 99"):
        Proposal.measured(torch.tensor([0, 5]), torch.ones(2, 1), 100)


@pytest.mark.parametrize("draws", [4, 8])
def test_intervals_hold_for_pictures_unlike_those_measured(draws):
    """As the shipped model's: held-out pictures still have terms where those of training pictures have ended."""
    t, T = grid(1000, 24), torch.arange(1, 1000)
    proposal = Proposal.measured(t, 800 / t[:, None] ** 1.1 * torch.where(t < 128, 1, 0.05)[:, None], 1000)
    values, generator = 800 / T**1.1 + 0.8 * ((T > 128) & (T < 512)), torch.Generator().manual_seed(0)
    covered = []
    for _ in range(500):
        drawn = [stratified(proposal, 8, generator) for _ in range(draws)]
        sums = tuple(float((weights * values[times - 1]).sum()) for times, weights in drawn)
        low, high = Bound(0, 0, 0, 0, 0, sums, 1, 0).interval
        covered.append(low <= values.sum() <= high)
    assert 0.86 <= np.mean(covered) <= 0.94
