"""Sample order and random streams: a pure function of (seed, step, position)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from latentdiff import LatentDiffError
from latentdiff.data.order import BatchPlan, random_stream, shuffled_index


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
def test_each_epoch_is_a_permutation(size, seed, epoch):
    assert sorted(shuffled_index(epoch * size + i, size, seed) for i in range(size)) == list(range(size))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(shuffled_index(epoch * 50 + i, 50, seed) for i in range(50)) for epoch in range(5) for seed in range(5)
    }
    assert len(orders) == 25


def test_shuffling_is_uniform():
    """The position of a picture is uniform: chi-squared over 2000 epochs, for the first, a middle and the last one."""
    size = 37  # far from a power of four
    landed = np.array([[shuffled_index(epoch * size + i, size, 9) for i in (0, 18, 36)] for epoch in range(2000)])
    for column in landed.T:
        assert stats.chisquare(np.bincount(column, minlength=size)).pvalue > 1e-3


def test_an_index_among_a_billion_pictures_needs_no_table():
    """A table of a billion entries would take gigabytes; single indices are computed directly."""
    found = {shuffled_index(i, 10**9, 0) for i in range(1000)}
    assert len(found) == 1000
    assert max(found) > 9 * 10**8


def test_random_streams_are_addressed_directly():
    late = random_stream(1, "train_latent", 10**9, 17).standard_normal(5)
    assert np.array_equal(late, random_stream(1, "train_latent", 10**9, 17).standard_normal(5))
    others = [random_stream(2, "train_latent", 10**9, 17), random_stream(1, "train_vae", 10**9, 17),
              random_stream(1, "train_latent", 10**9 + 1, 17), random_stream(1, "train_latent", 10**9, 18)]  # fmt: skip
    assert all(not np.allclose(late, other.standard_normal(5)) for other in others)


def test_neighboring_random_streams_are_independent():
    """Streams at adjacent positions and steps are normal, and uncorrelated within 4 standard errors."""
    numbers = np.array([[random_stream(0, "train_latent", step, i).standard_normal(4) for i in range(40)]
                        for step in range(200)])  # fmt: skip
    assert stats.kstest(numbers.ravel(), "norm").pvalue > 1e-3
    for one, other in (
        (numbers[1:], numbers[:-1]),
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers[..., 1:], numbers[..., :-1]),
    ):
        assert abs(np.mean(one * other)) < 4 / np.sqrt(one.size)


@given(world=st.sampled_from([1, 2, 4]), micro=st.sampled_from([None, 1, 2, 3, 6]), batch=st.sampled_from([12, 24, 48]))
def test_positions_of_all_processes_make_up_the_batch(world, micro, batch):
    try:
        plans = [BatchPlan(batch, rank, world, micro) for rank in range(world)]
    except LatentDiffError:
        assert batch % (world * (micro or 1))
        return
    positions = [i for plan in plans for part in range(plan.accumulation_steps) for i in plan.global_indices(part)]
    assert sorted(positions) == list(range(batch))
    assert all(len(plan.global_indices(0)) == plan.pictures_per_pass for plan in plans)


def test_an_uneven_batch_raises():
    with pytest.raises(
        LatentDiffError, match=r"batch_size=10: expected a multiple of 4 processes x micro_batch_size 2"
    ):
        BatchPlan(10, 0, 4, 2)
