"""Which mixture of kept averages is closest to an average of another length (arXiv 2312.02696, section 3.2).

An average is an integral over the training so far, and its profile says how much each moment weighs in it:

    p(x) = (gamma + 1) x^gamma / t^(gamma + 1)    for 0 <= x <= t, and 0 afterwards

The weights stay as they are within a step, so the integral over it is the weight that `EMA` gives that step. A mixture
of averages has the same mixture of profiles; the best one is found by least squares, in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .ema import MAX_SIGMA_REL, gamma_from_sigma_rel

MOST_MISSED = 0.05  # of a profile, relative: an average that cannot be rebuilt more closely is refused
SHORTEST, TRIED = 0.005, 400  # where the search for what can be reached begins, and the number of lengths it tries

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """The profile of the average of length `sigma_rel` at the end of a step."""

    step: int
    sigma_rel: float


@dataclass(frozen=True)
class Mixture:
    """The mixture of some profiles that is closest to another one."""

    weights: list[float]  # one for each profile; they sum to 1
    missed: float  # norm of the difference, relative to that of the profile


def inner_products(rows: Sequence[Profile], columns: Sequence[Profile]) -> Array:
    """Return the integrals of the products of two lists of profiles, (rows, columns), in closed form (appendix C.3).

    Of two profiles, the later one's is the only exponent that is left:

        (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) * (earlier / later)^gamma_later / later
    """
    t_a, gamma_a = (values[:, None] for values in _columns(rows))
    t_b, gamma_b = _columns(columns)
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    exponent = np.where(t_a < t_b, gamma_b, gamma_a)
    factor = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    product: Array = factor * (earlier / later) ** exponent / later
    return product


def closest_mixtures(available: Sequence[Profile], wanted: Sequence[Profile]) -> list[Mixture]:
    """Return the mixtures of the available profiles, with weights that sum to 1, that are closest to the wanted ones.

    Without the condition the sum misses 1 by up to 1e-4 (24 snapshots), and all weights of the model would be off by
    that much, which is as far as two averages of different lengths are apart.
    """
    products = inner_products(available, available)
    norms = np.sqrt(np.diag(products))[:, None]
    products /= norms * norms.T  # profiles of norm 1 keep the system well scaled
    towards = inner_products(available, wanted) / norms
    # Stationary points of the Lagrangian.
    system = np.block([[products, 1 / norms], [1 / norms.T, np.zeros((1, 1))]])
    scaled = np.linalg.lstsq(system, np.vstack([towards, np.ones(len(wanted))]), rcond=None)[0][:-1]
    squares = np.diag(inner_products(wanted, wanted))
    missed = squares + (scaled * (products @ scaled - 2 * towards)).sum(0)
    relative = np.sqrt(np.maximum(missed, 0) / squares)
    return [Mixture(*found) for found in zip((scaled / norms).T.tolist(), relative.tolist(), strict=True)]


def reachable(available: Sequence[Profile], step: int) -> tuple[float, float] | None:
    """Return the shortest and the longest length at a step that a mixture misses by little enough; None if none is."""
    lengths = np.geomspace(SHORTEST, 0.999 * MAX_SIGMA_REL, TRIED).tolist()
    found = closest_mixtures(available, [Profile(step, length) for length in lengths])
    near = [length for length, each in zip(lengths, found, strict=True) if each.missed <= MOST_MISSED]
    return (near[0], near[-1]) if near else None


def _columns(profiles: Sequence[Profile]) -> tuple[Array, Array]:
    """Steps and exponents."""
    steps = np.array([profile.step for profile in profiles], dtype=np.float64)
    return steps, np.array([gamma_from_sigma_rel(profile.sigma_rel) for profile in profiles])
