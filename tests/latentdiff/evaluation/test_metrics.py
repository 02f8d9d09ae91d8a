"""PSNR against its formula in numpy, SSIM against an implementation with scipy's Gaussian filter."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from latentdiff.errors import LatentDiffError
from latentdiff.evaluation.metrics import psnr, ssim


@pytest.fixture(params=[(64, 64), (11, 40)], ids=str)
def pair(request):
    """Pictures, and perturbed copies that leave [-1, 1]."""
    x = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8) * 2 - 1, size=request.param, mode="bilinear")
    strengths = torch.tensor([0.003, 0.05, 0.3, 2.0]).view(4, 1, 1, 1)
    return x, x + strengths * torch.randn_like(x)


def levels(pixels: torch.Tensor) -> np.ndarray:
    """The levels that a PNG file would hold, divided by 255."""
    return np.clip(np.rint((pixels.double().numpy() + 1) * 127.5), 0, 255).astype(np.uint8).astype(np.float64) / 255


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of one channel (H, W): the formula over the entire plane, then cropped to windows inside it."""

    def blur(image: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(image, sigma=1.5, radius=5, mode="reflect")

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur((x) ** 2) - mean_x**2, blur(y**2) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    ratio = numerator / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
    return float(ratio[5:-5, 5:-5].mean())


def test_psnr(pair):
    x, y = (levels(pixels) for pixels in pair)
    expected = 10 * np.log10(1 / np.mean((x - y) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(psnr(*pair).numpy(), expected, rtol=1e-12)


def test_ssim(pair):
    x, y = (levels(pixels) for pixels in pair)
    expected = [np.mean([reference_ssim(x[b, c], y[b, c]) for c in range(3)]) for b in range(4)]
    np.testing.assert_allclose(ssim(*pair).numpy(), expected, rtol=0, atol=1e-9)


def test_equal_pictures(pair):
    x, _ = pair
    assert psnr(x, x).isinf().all()
    torch.testing.assert_close(ssim(x, x), torch.ones(4).double())


def test_one_level_everywhere_is_48_db():
    x = torch.full((1, 3, 16, 16), 0.0)
    assert float(psnr(x, x + 2 / 255)) == pytest.approx(20 * np.log10(255))


def test_less_than_a_level_is_ignored():
    x = torch.full((1, 3, 16, 16), 3 / 127.5)
    assert psnr(x, x + 0.4 / 127.5).isinf().all()
    assert psnr(x + 1.0, x + 3.0).isinf().all()  # both are white


def test_half_precision(pair):
    x, y = (pixels.bfloat16() for pixels in pair)
    assert torch.equal(ssim(x, y), ssim(x.double(), y.double()))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_wrong_shapes(measure):
    with pytest.raises(LatentDiffError, match="shapes"):
        measure(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    with pytest.raises(LatentDiffError, match="shapes"):
        measure(torch.zeros(3, 16, 16), torch.zeros(3, 16, 16))


def test_smaller_than_the_window():
    with pytest.raises(LatentDiffError, match="needs at least 11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))
