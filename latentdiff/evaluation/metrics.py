"""How close a reconstruction is to its picture: PSNR and SSIM.

Both measure what a user sees: pixels are clamped to [-1, 1] and rounded to the 256 levels of a file first.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.errors import LatentDiffError

C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for pixels in [0, 1]
WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window, in pixels


def psnr(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, (B,) dB, float64: 10 log10(1 / mean squared error on [0, 1]).

    Args:
        pixels: (B, C, H, W) in [-1, 1].
        reconstruction: the same shape.

    Returns:
        (B,); infinite where all pixels are equal.

    Raises:
        LatentDiffError: the shapes differ.
    """
    x, y = _as_seen(pixels, reconstruction)
    return -10.0 * (x - y).square().mean((1, 2, 3)).log10()


def ssim(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity of each picture, (B,) in [-1, 1], float64; 1 for equal pictures.

    Wang et al. 2004 (doi 10.1109/TIP.2003.819861): Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01,
    K2 = 0.03; only windows that lie within the picture; the mean over R, G and B rather than of the luminance, so that
    a wrong colour counts.

    Args:
        pixels: (B, C, H, W) in [-1, 1], H and W at least 11.
        reconstruction: the same shape.

    Raises:
        LatentDiffError: the shapes differ, or the pictures are smaller than the window.
    """
    if pixels.dim() == 4 and min(pixels.shape[2:]) < WINDOW:
        raise LatentDiffError(f"pixels have shape {tuple(pixels.shape)}; SSIM needs {WINDOW} pixels a side at least")
    x, y = _as_seen(pixels, reconstruction)
    return ssim_map(x, y, _gaussian).mean((1, 2, 3))


def ssim_map(x: Tensor, y: Tensor, smooth: Callable[[Tensor], Tensor]) -> Tensor:
    """SSIM at every window (Wang et al. 2004, equation 13), for pictures in [0, 1].

    Args:
        x: (B, C, H, W); float32 at least: the variances are small differences of large numbers.
        y: the same shape.
        smooth: weighted mean over each window, (B, C, H, W) -> (B, C, H', W').

    Returns:
        (B, C, H', W').
    """
    mean_x, mean_y = smooth(x), smooth(y)
    var_x = smooth(x * x) - mean_x * mean_x
    var_y = smooth(y * y) - mean_y * mean_y
    covariance = smooth(x * y) - mean_x * mean_y
    luminance = (2.0 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
    contrast_and_structure = (2.0 * covariance + C2) / (var_x + var_y + C2)
    return luminance * contrast_and_structure


def _as_seen(*batches: Tensor) -> list[Tensor]:
    """Batches of pixels in [-1, 1] as multiples of 1/255 in [0, 1], float64."""
    shapes = [tuple(pixels.shape) for pixels in batches]
    if len(set(shapes)) > 1 or len(shapes[0]) != 4:
        raise LatentDiffError(f"pixels and reconstruction have shapes {shapes}; expected (B, C, H, W) twice")
    if batches[0].device.type == "mps":  # does not compute in float64
        batches = tuple(pixels.cpu() for pixels in batches)
    return [((pixels.double() + 1.0) * 127.5).round().clamp(0.0, 255.0) / 255.0 for pixels in batches]


def _gaussian(x: Tensor) -> Tensor:
    """Weighted means over all 11 x 11 windows within the picture, one axis after the other."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = (-0.5 * (offsets / SIGMA).square()).exp()
    column = (weights / weights.sum()).view(1, 1, -1, 1).expand(x.shape[1], 1, -1, 1)
    x = F.conv2d(x, column, groups=x.shape[1])
    return F.conv2d(x, column.transpose(2, 3), groups=x.shape[1])
