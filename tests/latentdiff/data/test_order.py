"""What a step is made of: a function of (seed, step, place)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from latentdiff import LatentDiffError
from latentdiff.data.order import BatchPlan, draws, shuffled


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
def test_each_epoch_is_a_permutation(size, seed, epoch):
    assert sorted(shuffled(epoch * size + place, size, seed) for place in range(size)) == list(range(size))


def test_epochs_and_seeds_differ():
    orders = {tuple(shuffled(epoch * 50 + i, 50, seed) for i in range(50)) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25


def test_the_order_is_shuffled_evenly():
    """Where a picture lands is uniform: chi-squared over 2000 epochs, for the first, a middle and the last one."""
    size = 37  # far from a power of four
    landed = np.array([[shuffled(epoch * size + place, size, 9) for place in (0, 18, 36)] for epoch in range(2000)])
    for column in landed.T:
        assert stats.chisquare(np.bincount(column, minlength=size)).pvalue > 1e-3


def test_a_billion_pictures_cost_what_a_thousand_do():
    """No table: the time for an index does not grow with the number of pictures by more than the walk's luck."""
    found = {shuffled(place, 10**9, 0) for place in range(1000)}
    assert len(found) == 1000
    assert max(found) > 9 * 10**8


def test_draws_are_named_not_advanced_to():
    late = draws(1, "train_latent", 10**9, 17).standard_normal(5)
    assert np.array_equal(late, draws(1, "train_latent", 10**9, 17).standard_normal(5))
    others = [draws(2, "train_latent", 10**9, 17), draws(1, "train_vae", 10**9, 17),
              draws(1, "train_latent", 10**9 + 1, 17), draws(1, "train_latent", 10**9, 18)]  # fmt: skip
    assert all(not np.allclose(late, other.standard_normal(5)) for other in others)


def test_neighbouring_draws_are_independent():
    """Places and steps next to each other: normal, and uncorrelated within 4 standard errors."""
    numbers = np.array([[draws(0, "train_latent", step, place).standard_normal(4) for place in range(40)]
                        for step in range(200)])  # fmt: skip
    assert stats.kstest(numbers.ravel(), "norm").pvalue > 1e-3
    for one, other in (
        (numbers[1:], numbers[:-1]),
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers[..., 1:], numbers[..., :-1]),
    ):
        assert abs(np.mean(one * other)) < 4 / np.sqrt(one.size)


@given(world=st.sampled_from([1, 2, 4]), micro=st.sampled_from([None, 1, 2, 3, 6]), batch=st.sampled_from([12, 24, 48]))
def test_the_places_of_all_processes_are_the_batch(world, micro, batch):
    try:
        plans = [BatchPlan(batch, rank, world, micro) for rank in range(world)]
    except LatentDiffError:
        assert batch % (world * (micro or 1))
        return
    places = [place for plan in plans for part in range(plan.accumulation_steps) for place in plan.global_indices(part)]
    assert sorted(places) == list(range(batch))
    assert all(len(plan.global_indices(0)) == plan.pictures_a_pass for plan in plans)


def test_an_uneven_batch_is_refused():
    with pytest.raises(
        LatentDiffError, match=r"batch_size=10: expected a multiple of 4 processes x micro_batch_size 2"
    ):
        BatchPlan(10, 0, 4, 2)
