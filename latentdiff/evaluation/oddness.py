"""Which pictures do not belong: those that cost the model more, or less, than others of their complexity."""

import torch
from torch import Tensor

from ..errors import LatentDiffError

FEWEST = 8  # pictures to compare
MAD = 1.4826  # standard deviations of a normal distribution per median absolute deviation


def oddness(bits: Tensor, png: Tensor) -> Tensor:
    """Return how far the model's bits per value of pictures (N,) are from what their PNGs' suggest, in deviations.

    Raw likelihood says how smooth a picture is above all. So a line through the medians (Theil & Sen) predicts the
    model's bits from the PNG's, and what counts is the distance from it, on either side: strange pictures may be cheap.
    """
    if bits.shape != png.shape or bits.dim() != 1 or len(bits) < FEWEST:
        raise LatentDiffError(f"bits {tuple(bits.shape)} and png {tuple(png.shape)}: expected (N,), at least {FEWEST}")
    bits, png = bits.double(), png.double()
    rise, run = bits[:, None] - bits, png[:, None] - png
    slopes = (rise / run)[run.abs() > 1e-9]
    slope = slopes.median() if len(slopes) else torch.zeros((), dtype=torch.float64)
    residual = bits - slope * png
    distance = (residual - residual.median()).abs()
    return distance / (MAD * distance.median()).clamp(min=1e-9)
