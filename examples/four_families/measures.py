"""How near drawn pictures are to real ones: distances and neighbors in the space of their main components."""

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

COMPONENTS, NEIGHBORS = 64, 5


class Space:
    """The first principal components of pictures, each scaled as it is."""

    def __init__(self, levels: Tensor) -> None:
        flat = levels.flatten(1).double() / 255
        self.mean = flat.mean(0)
        self.basis = torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[:COMPONENTS].T

    def __call__(self, levels: Tensor) -> Tensor:
        """Return the components, (N, 64)."""
        return (levels.flatten(1).double() / 255 - self.mean) @ self.basis


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |m - n|^2 + tr(S + T - 2 (S T)^(1/2)) of the Gaussians fitted to (N, D) and (M, D)."""
    s, t = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    return float((a.mean(0) - b.mean(0)).square().sum()) + float(np.trace(s + t - 2 * root))


def radii(x: Tensor) -> Tensor:
    """Return the distance from each point to its k-th nearest neighbor, (N,)."""
    return torch.cdist(x, x).kthvalue(NEIGHBORS + 1, dim=1).values  # the nearest is itself


def precision_recall_coverage(real: Tensor, drawn: Tensor) -> tuple[float, float, float]:
    """Return the shares of drawn points near real ones, of real near drawn, and of real with a drawn one near.

    Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991). Coverage: Naeem et al. 2020 (arXiv 2002.09797),
    equation 5, which measures nearness by the real neighbors and so is not raised by drawn outliers.
    """
    distance, of_real, of_drawn = torch.cdist(real, drawn), radii(real)[:, None], radii(drawn)
    precision = (distance < of_real).any(0)
    recall = (distance < of_drawn).any(1)
    coverage = (distance < of_real).any(1)
    return tuple(float(each.double().mean()) for each in (precision, recall, coverage))  # type: ignore[return-value]


def sharpness(levels: Tensor) -> float:
    """Return the mean absolute difference between neighboring values, in levels."""
    x = levels.double()
    return float((x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()) / 2)
