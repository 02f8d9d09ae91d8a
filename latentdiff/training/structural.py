"""`StructuralLoss`: stands in for LPIPS where its weights are not at hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.diffusion.schedule import at_least_float32
from latentdiff.errors import LatentDiffError
from latentdiff.evaluation.metrics import ssim_map

WINDOW = 7  # pixels a side
MAX_SCALES = 5  # as many as MS-SSIM has


class StructuralLoss(nn.Module):
    """1 - SSIM, averaged over the picture and over scales, each half as large as the one before.

    After MS-SSIM (Wang et al. 2003, doi 10.1109/ACSSC.2003.1292216), with a mean over the scales where that takes a
    product of powers, whose gradient is not finite where a factor is 0 and which is undefined below. Box windows
    instead of Gaussian ones: on the CPU they cost little, and on a GPU pooling never rounds to TF32, which the small
    differences inside an SSIM would not survive.
    """

    def forward(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
        """Two batches (B, C, H, W) in [-1, 1] to (B,): 0 for equal pictures, 1 for unrelated ones, 2 at most.

        Raises:
            LatentDiffError: the pictures are smaller than one window.
        """
        if min(pixels.shape[2:]) < WINDOW:
            raise LatentDiffError(f"pixels are {tuple(pixels.shape[2:])}; this loss needs {WINDOW} a side at least")
        x, y = ((at_least_float32(image) + 1.0) / 2.0 for image in (pixels, reconstruction))
        losses: list[Tensor] = []
        while len(losses) < MAX_SCALES and min(x.shape[2:]) >= WINDOW:
            losses.append(1.0 - ssim_map(x, y, _box).mean((1, 2, 3)))
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return torch.stack(losses).mean(0)


def _box(x: Tensor) -> Tensor:
    """Means over all windows that lie within the picture."""
    return F.avg_pool2d(x, WINDOW, stride=1)
