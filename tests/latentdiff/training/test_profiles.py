"""Profiles of averages against numerical integration, and what a mixture of them reaches."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from latentdiff.training.ema import TRACKED, gamma_from_sigma_rel
from latentdiff.training.profiles import MOST_MISSED, Profile, closest_mixtures, inner_products, reachable


def density(profile: Profile, x: float) -> float:
    """The definition: proportional to x^gamma up to the step, with integral 1."""
    gamma = gamma_from_sigma_rel(profile.sigma_rel)
    return (gamma + 1) / profile.step * (x / profile.step) ** gamma if x <= profile.step else 0.0


def integral(function, end: float, *corners: float) -> float:
    return quad(function, 0, end, points=corners, epsabs=0, epsrel=1e-12, limit=500)[0]


def kept(number: int, steps: int) -> list[Profile]:
    return [Profile(steps * k // number, width) for k in range(1, number + 1) for width in TRACKED.values()]


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_sigma_rel_is_the_deviation_of_the_profile(sigma_rel):
    profile = Profile(1, sigma_rel)
    mean, square = (integral(lambda x, n=n: x**n * density(profile, x), 1.0) for n in (1, 2))
    assert integral(lambda x: density(profile, x), 1.0) == pytest.approx(1, rel=1e-10)
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-9)


def test_inner_products_are_integrals():
    profiles = [Profile(*each) for each in ((300, 0.05), (300, 0.1), (1000, 0.05), (1000, 0.2), (990, 0.02), (7, 0.28))]
    expected = [[integral(lambda x, a=a, b=b: density(a, x) * density(b, x), min(a.step, b.step))
                 for b in profiles] for a in profiles]  # fmt: skip
    np.testing.assert_allclose(inner_products(profiles, profiles), expected, rtol=1e-9)


def test_the_mixture_for_a_kept_average_is_that_average_alone():
    profiles = kept(24, 4200)
    for place, found in enumerate(closest_mixtures(profiles, profiles)):
        np.testing.assert_allclose(found.weights, np.eye(48)[place], atol=1e-9)
        assert found.missed < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.04, 0.2])
def test_what_a_mixture_misses_is_the_norm_of_the_difference(sigma_rel):
    """By quadrature; constant weights stay what they are, and no other mixture of the same sum is closer."""
    profiles, wanted = kept(4, 400), Profile(400, sigma_rel)
    (found,) = closest_mixtures(profiles, [wanted])
    assert sum(found.weights) == pytest.approx(1, abs=1e-12)

    def missed(weights: np.ndarray) -> float:
        pairs = list(zip(weights, profiles, strict=True))
        square = integral(lambda x: (density(wanted, x) - sum(w * density(p, x) for w, p in pairs)) ** 2, 400,
                          100, 200, 300)  # fmt: skip
        return math.sqrt(square / integral(lambda x: density(wanted, x) ** 2, 400))

    assert found.missed == pytest.approx(missed(found.weights), rel=1e-6)
    for place in (0, 3, 6):
        nudged = found.weights + 0.01 * (np.eye(8)[place] - np.eye(8)[place + 1])
        assert missed(nudged) > found.missed


@pytest.mark.parametrize(("number", "low", "high"), [(24, 0.03, 0.15), (32, 0.02, 0.2)])
def test_the_widths_that_are_reached(number, low, high):
    profiles, last = kept(number, 100 * number), 100 * number
    shortest, longest = reachable(profiles, last)
    assert shortest < low < high < longest
    ends = (0.99 * shortest, 1.01 * shortest, 0.99 * longest, 1.01 * longest)
    found = closest_mixtures(profiles, [Profile(last, width) for width in ends])
    assert [each.missed <= MOST_MISSED for each in found] == [False, True, True, False]
