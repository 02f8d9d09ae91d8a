"""Which pictures do not belong: those unusually simple or complex, and those that cost more, or less, than such do."""

import torch
from torch import Tensor

from ..errors import LatentDiffError

FEWEST = 8  # pictures to compare
ODD = 3.5  # deviations from which a picture stands out
MAD = 1.4826  # standard deviations of a normal distribution per median absolute deviation


def oddness(bits: Tensor, png: Tensor) -> Tensor:
    """Return how far pictures (N,) are from the others in the model's bits and the PNG's, in standard deviations.

    Raw likelihood says how smooth a picture is above all, and strange pictures may be cheap. So two things count, on
    either side: the logarithm of the PNG's bits, and how far that of the model's is from the line through the medians
    (Theil & Sen) that predicts it from the PNG's. Medians stay where they are if some of the pictures are strange.
    """
    if bits.shape != png.shape or bits.dim() != 1 or len(bits) < FEWEST:
        raise LatentDiffError(f"bits {tuple(bits.shape)} and png {tuple(png.shape)}: expected (N,), at least {FEWEST}")
    if not bool((bits > 0).all() and (png > 0).all()):
        raise LatentDiffError(f"bits from {float(bits.min()):g} and png from {float(png.min()):g}: expected above 0")
    bits, png = bits.double().log(), png.double().log()
    rise, run = bits[:, None] - bits, png[:, None] - png
    slopes = (rise / run)[run.abs() > 1e-9]
    slope = slopes.median() if len(slopes) else torch.zeros((), dtype=torch.float64)
    return torch.hypot(deviations(bits - slope * png), deviations(png))


def deviations(values: Tensor) -> Tensor:
    """Return how far values (N,) are from their median, in standard deviations by the median of that."""
    distance = (values - values.median()).abs()
    return distance / (MAD * distance.median()).clamp(min=1e-9)
