"""Prompt fidelity against counting by hand."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from latentdiff import LatentDiffError
from latentdiff.evaluation.concepts import agreement, choose, concepts_of, ranks


def test_ranks_against_a_loop():
    random = np.random.default_rng(0)
    queries, gallery = random.normal(size=(300, 5)), random.normal(size=(40, 5))
    requested, shown = random.integers(0, 4, 300), random.integers(0, 4, 40)
    expected, first = [], []
    for query, concept in zip(queries, requested, strict=True):
        order = np.argsort(((gallery - query) ** 2).sum(1))
        expected.append(list(shown[order] == concept).index(True))
        first.append(order[0])
    found, nearest = ranks(*map(torch.tensor, (queries, gallery, requested, shown)))
    assert found.tolist() == expected
    assert nearest.tolist() == first


def test_a_collapsed_encoder_never_agrees():
    """If all features are equal, a picture of another concept is just as near, which is not a match."""
    names = ["a", "b", "c", "d"]
    assert agreement("x", torch.ones(4, 3), torch.ones(4, 3), names, names)[0].top1 == 0.0
    with pytest.raises(LatentDiffError, match="not finite"):
        agreement("x", torch.full((4, 3), torch.nan), torch.ones(4, 3), names, names)


def test_agreement_of_copies_and_of_swapped_pictures():
    """Copies of the gallery always agree, and never with shuffled prompts; swapped pictures never agree."""
    gallery = torch.eye(6)
    names = ["a", "a", "b", "b", "c", "c"]
    found, _, nearest = agreement("x", gallery + 0.1, gallery, names, names)
    assert nearest.tolist() == list(range(6))
    assert (found.top1, found.median_rank, found.shuffled) == (1.0, 0.0, 0.0)
    assert found.chance == pytest.approx(1 / 3)
    swapped, _, _ = agreement("x", gallery[[2, 3, 4, 5, 0, 1]], gallery, names, names)
    assert swapped.top1 == 0.0
    assert swapped.median_rank > 0


def test_the_standard_error_counts_concepts():
    """Eight pictures of each of 40 concepts, all right or all wrong, are 40 observations, not 320."""
    gallery, names = torch.eye(40), [f"c{number}" for number in range(40)]
    requested = [name for name in names for _ in range(8)]
    indices = torch.arange(40).repeat_interleave(8)
    wrong = indices < 10
    queries = gallery[torch.where(wrong, (indices + 1) % 40, indices)]
    found, _, _ = agreement("x", queries, gallery, requested, names)
    assert found.top1 == 0.75
    assert found.standard_error == pytest.approx((0.75 * 0.25 / 39) ** 0.5)


@pytest.mark.parametrize("right", [[True, False], [True, True], [False, False]])
def test_no_interval_vanishes(right):
    """Also if every concept has the same share, of two samples each."""
    gallery, names = torch.eye(40), [f"c{number}" for number in range(40)]
    rows = torch.tensor([row if hit else (row + 1) % 40 for row in range(40) for hit in right])
    found, _, _ = agreement("x", gallery[rows], gallery, [name for name in names for _ in right], names)
    assert found.top1 == sum(right) / 2
    assert found.standard_error == 0
    assert found.low <= found.top1 <= found.high
    independent = binomtest(round(40 * found.top1), 40).proportion_ci(0.9, "wilson")
    assert (found.low, found.high) == pytest.approx((independent.low, independent.high), abs=1e-4)


class Captions:
    def __init__(self, *captions):
        self.captions = captions

    def all_captions(self):
        return iter(self.captions)


def test_concepts_are_captions_without_their_style():
    source = Captions(["a 3d emoji of a cat", "x"], ["a noto emoji of a cat"], [], ["a 3d emoji of an owl"])
    assert concepts_of(source, r"^an? (3d|noto) emoji of ") == ["a cat", "a cat", "", "an owl"]
    assert concepts_of(source)[0] == "a 3d emoji of a cat"
    with pytest.raises(LatentDiffError, match=r"style '\(': not a valid regular expression"):
        concepts_of(source, "(")


def test_chosen_concepts_are_distinct_and_set_by_the_seed():
    concepts = [f"c{number // 3}" for number in range(90)] + [""]
    chosen = choose(concepts, 20, seed=1)
    assert len({concepts[index] for index in chosen}) == 20
    assert chosen == choose(concepts, 20, seed=1) != choose(concepts, 20, seed=2)
    assert len(choose(concepts, 64, seed=1)) == 30  # all of them, except the one without a caption
    with pytest.raises(LatentDiffError, match="concepts: 1 available, 64 requested"):
        choose(["a", "a", ""], 64, seed=1)
