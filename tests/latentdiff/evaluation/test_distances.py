"""Fréchet distance, kernel distances and figures of neighbors, against their definitions written out."""

import numpy as np
import pytest
import scipy.linalg
import torch

from latentdiff.evaluation.distances import (
    Pairs,
    discrepancy,
    distance,
    frechet_distance,
    gaussian,
    neighbors,
    polynomial,
)


@pytest.fixture
def sets():
    """40 and 30 pictures with 6 features; some of the second are close to some of the first."""
    random = np.random.default_rng(0)
    real = random.normal(size=(40, 6))
    drawn = np.concatenate([real[:10] + 0.2 * random.normal(size=(10, 6)), 0.5 + 0.6 * random.normal(size=(20, 6))])
    return torch.from_numpy(real), torch.from_numpy(drawn)


def texts(real, drawn):
    return torch.arange(len(real)), torch.arange(len(real), len(real) + len(drawn))


@pytest.mark.parametrize("size", [6, 60])
def test_frechet_distance(size):
    """Against scipy's square root of a matrix; with 60 features of 40 pictures the covariances have no full rank."""
    random = np.random.default_rng(1)
    x, y = random.normal(size=(40, size)), 1.0 + 2.0 * random.normal(size=(30, size))
    covariances = [np.cov(each, rowvar=False) for each in (x, y)]
    singular = 1e-12 * np.eye(size) if size == 60 else 0.0  # sqrtm fails on those
    root = scipy.linalg.sqrtm((covariances[0] + singular) @ (covariances[1] + singular)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    found = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-6 if size == 6 else 1e-4)
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(x)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("kernel", "one"),
    [
        (polynomial, lambda x, y: (np.dot(x, y) / 6 + 1) ** 3),
        (gaussian, lambda x, y: np.exp(-((x - y) ** 2).sum() / 200)),
    ],
)
def test_discrepancy(sets, kernel, one):
    """The unbiased estimate, as a sum over pairs; far from zero here."""
    x, y = (each.numpy() for each in sets)
    terms = [np.mean([one(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    expected = sum(terms) - 2 * np.mean([one(a, b) for a in x for b in y])
    assert discrepancy(Pairs.of(kernel, *sets), *texts(*sets)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("concepts", [3, 1000])
def test_pictures_of_one_prompt_do_not_count_as_independent(concepts):
    """Zero on average if model and data are alike, also with four pictures of each prompt; a plain mean is not."""
    random, found, plain = np.random.default_rng(0), [], []
    means = random.normal(size=(concepts, 4))
    for _ in range(60):
        captions = random.integers(concepts, size=150)
        prompts = random.integers(concepts, size=20).repeat(4)
        x, y = (
            torch.from_numpy(means[each] + 0.3 * random.normal(size=(len(each), 4))) for each in (captions, prompts)
        )
        pairs = Pairs.of(polynomial, x, y)
        found.append(discrepancy(pairs, torch.from_numpy(captions), torch.from_numpy(prompts)))
        plain.append(discrepancy(pairs, *texts(x, y)))
    error = np.std(found) / 60**0.5
    assert abs(np.mean(found)) < 3 * error
    assert np.mean(plain) > 4 * error


def test_neighbors(sets):
    """Precision, recall, density and coverage, picture by picture."""
    x, y = (each.numpy() for each in sets)

    def radius(points, k):
        return [
            sorted(np.linalg.norm(p - q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)
        ]

    def inside(point, centers, radii):
        return sum(np.linalg.norm(point - c) <= r for c, r in zip(centers, radii, strict=True))

    precision = np.mean([inside(p, x, radius(x, 3)) > 0 for p in y])
    recall = np.mean([inside(p, y, radius(y, 3)) > 0 for p in x])
    balls = radius(x, 5)
    density = np.mean([inside(p, x, balls) for p in y]) / 5
    coverage = np.mean([min(np.linalg.norm(p - q) for q in y) <= r for p, r in zip(x, balls, strict=True)])
    found = neighbors(Pairs.of(distance, *sets))
    assert found.tolist() == pytest.approx([precision, recall, density, coverage], abs=1e-12)
    assert 0.3 < recall < 1.0


def test_copies_of_all_pictures(sets):
    """A model that copies covers everything; one that draws a single picture is precise and covers almost nothing."""
    real, _ = sets
    assert neighbors(Pairs.of(distance, real, real)).tolist() == pytest.approx([1, 1, 1.2, 1])
    one = real[:1] + 1e-6 * torch.randn(40, 6, dtype=torch.float64)
    precision, recall, _, coverage = neighbors(Pairs.of(distance, real, one)).tolist()
    assert precision == 1.0
    assert recall < 0.05
    assert coverage < 0.5
