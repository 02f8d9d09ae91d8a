"""How close a reconstruction is to its picture: PSNR and SSIM.

Both compare what a viewer sees: pixels are first clamped to [-1, 1] and rounded to the 256 levels of an 8-bit file.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.errors import LatentDiffError

C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for pixels in [0, 1]
WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window, in pixels


def psnr(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each picture: 10 log10(1 / mean squared error), for pixels in [0, 1].

    Args:
        pixels: (B, C, H, W) in [-1, 1].
        reconstruction: same shape.

    Returns:
        (B,) float64, in dB; infinite if all pixels are equal.

    Raises:
        LatentDiffError: the shapes differ.
    """
    x, y = _quantize(pixels, reconstruction)
    return -10.0 * (x - y).square().mean((1, 2, 3)).log10()


def ssim(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the structural similarity of each picture.

    Wang et al. 2004 (doi 10.1109/TIP.2003.819861): 11 x 11 Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03,
    averaged over the windows that lie inside the picture. It is the mean over R, G and B rather than that of the
    luminance, so that wrong colors count.

    Args:
        pixels: (B, C, H, W) in [-1, 1], H and W at least 11.
        reconstruction: same shape.

    Returns:
        (B,) float64 in [-1, 1]; 1 for equal pictures.

    Raises:
        LatentDiffError: the shapes differ, or the pictures are smaller than the window.
    """
    if pixels.dim() == 4 and min(pixels.shape[2:]) < WINDOW:
        raise LatentDiffError(f"pixels have shape {tuple(pixels.shape)}; SSIM needs at least {WINDOW} pixels per side")
    x, y = _quantize(pixels, reconstruction)
    return ssim_map(x, y, _gaussian).mean((1, 2, 3))


def ssim_map(x: Tensor, y: Tensor, smooth: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the SSIM of every window (Wang et al. 2004, equation 13), for pictures (B, C, H, W) in [0, 1].

    `smooth` takes the weighted mean over each window, (B, C, H, W) -> (B, C, H', W'). Use at least float32: the
    variances are small differences of large numbers.
    """
    mean_x, mean_y = smooth(x), smooth(y)
    var_x = smooth(x * x) - mean_x * mean_x
    var_y = smooth(y * y) - mean_y * mean_y
    covariance = smooth(x * y) - mean_x * mean_y
    luminance = (2.0 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
    contrast_and_structure = (2.0 * covariance + C2) / (var_x + var_y + C2)
    return luminance * contrast_and_structure


def _quantize(*batches: Tensor) -> list[Tensor]:
    """Round pixels in [-1, 1] to multiples of 1/255 in [0, 1], as float64."""
    shapes = [tuple(pixels.shape) for pixels in batches]
    if len(set(shapes)) > 1 or len(shapes[0]) != 4:
        raise LatentDiffError(f"pixels and reconstruction have shapes {shapes}; expected the same (B, C, H, W)")
    if batches[0].device.type == "mps":  # has no float64
        batches = tuple(pixels.cpu() for pixels in batches)
    return [((pixels.double() + 1.0) * 127.5).round().clamp(0.0, 255.0) / 255.0 for pixels in batches]


def _gaussian(x: Tensor) -> Tensor:
    """Take Gaussian-weighted means over all 11 x 11 windows inside the picture, one axis at a time."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = (-0.5 * (offsets / SIGMA).square()).exp()
    column = (weights / weights.sum()).view(1, 1, -1, 1).expand(x.shape[1], 1, -1, 1)
    x = F.conv2d(x, column, groups=x.shape[1])
    return F.conv2d(x, column.transpose(2, 3), groups=x.shape[1])
