"""How far apart two sets of pictures are, by their features (N, D), and how much of each the other covers; in float64.

All of them compare distributions: none asks whether a picture shows what its prompt says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

MANIFOLD, BALL = 3, 5  # nearest neighbors: of precision and recall, of density and coverage, as their papers have it
BANDWIDTH, CMMD_SCALE = 10.0, 1000.0  # of CMMD, as published


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """Return the squared Fréchet distance of the Gaussians with the means and covariances of two sets.

    Heusel et al. 2017 (arXiv 1706.08500): |m - n|^2 + tr(C + D - 2 (C D)^1/2). It is too large by a bias that shrinks
    with the number of pictures (Chong & Forsyth 2020).
    """
    (mean, covariance), (other, other_covariance) = (
        (features.mean(0), torch.cov(features.T)) for features in (real.double(), drawn.double())
    )
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0.0).sqrt() @ vectors.T
    # The eigenvalues of C D are those of the symmetric C^1/2 D C^1/2.
    shared = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0.0).sqrt().sum()
    return float((mean - other).square().sum() + covariance.trace() + other_covariance.trace() - 2.0 * shared)


@dataclass(frozen=True)
class Pairs:
    """A kernel or distance between all pictures of two sets."""

    real: Tensor  # (N, N)
    drawn: Tensor  # (M, M)
    cross: Tensor  # (N, M)

    @classmethod
    def of(cls, compare: Callable[[Tensor, Tensor], Tensor], real: Tensor, drawn: Tensor) -> Self:
        """Compare two sets of features, (N, D) and (M, D)."""
        real, drawn = real.double(), drawn.double()
        return cls(compare(real, real), compare(drawn, drawn), compare(real, drawn))

    def part(self, rows: Tensor, columns: Tensor) -> "Pairs":
        """Return the pairs of some real pictures with some drawn ones."""
        return Pairs(
            self.real[rows[:, None], rows],
            self.drawn[columns[:, None], columns],
            self.cross[rows[:, None], columns],
        )


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Return Euclidean distances, (N, M), without the cancellation of the faster formula."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Return the kernel (x.y / D + 1)^3 of the kernel distance KID, (N, M)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """Return the kernel exp(-|x - y|^2 / (2 * 10^2)) of CMMD for unit vectors, (N, M)."""
    return (-distance(x, y).square() / (2.0 * BANDWIDTH**2)).exp()


def discrepancy(kernel: Pairs, captions: Tensor, prompts: Tensor) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy of two sets; it may be negative.

    Gretton et al. 2012, lemma 6; KID (arXiv 1801.01401) with `polynomial`, CMMD (arXiv 2401.09603) with `gaussian`.
    `captions` (N,) and `prompts` (M,) number the texts. Pictures of one text resemble each other, so drawing several
    of each, or those of captions in the real set, must not count more than in a fresh pair: such pairs get the weight
    that they have in the real set.
    """
    alike, repeated, asked = (
        x[:, None] == y for x, y in ((captions, captions), (prompts, prompts), (captions, prompts))
    )
    share = float(_off_diagonal(alike).double().mean())
    real = _off_diagonal(kernel.real).mean()
    drawn = _fresh_mean(_off_diagonal(kernel.drawn), _off_diagonal(repeated), share)
    return float(real + drawn - 2.0 * _fresh_mean(kernel.cross, asked, share))


def neighbors(distances: Pairs) -> Tensor:
    """Return precision, recall, density and coverage, (4,).

    Kynkäänniemi et al. 2019 (arXiv 1904.06991), k = 3: the share of drawn pictures that are no farther from some real
    one than its k-th nearest real one, and the reverse. Naeem et al. 2020 (arXiv 2002.09797), k = 5: how many balls
    around real pictures a drawn one lies in, over k; and the share of real pictures with a drawn one in their ball.
    """
    inside = distances.cross <= _radius(distances.real, MANIFOLD)[:, None]
    reached = distances.cross <= _radius(distances.drawn, MANIFOLD)
    ball = distances.cross <= _radius(distances.real, BALL)[:, None]
    return torch.stack([inside.any(0).double().mean(), reached.any(1).double().mean(),
                        ball.double().sum(0).mean() / BALL, ball.any(1).double().mean()])  # fmt: skip


def _radius(distances: Tensor, k: int) -> Tensor:
    """Return each picture's distance to the k-th nearest other one of its set, (N,)."""
    return distances.kthvalue(k + 1, 1).values  # the first is itself


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Return the pairs of different pictures, (N, N - 1)."""
    size = len(matrix)
    return matrix.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)


def _fresh_mean(kernel: Tensor, same: Tensor, share: float) -> Tensor:
    """Return the mean over pairs, where those of the same text weigh as if they were `share` of all."""
    count = int(same.sum())
    if count in (0, same.numel()):
        return kernel.mean()
    total = (kernel * same).sum()
    return share * total / count + (1.0 - share) * (kernel.sum() - total) / (same.numel() - count)
