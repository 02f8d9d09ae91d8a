"""The losses of VAE training except the adversarial one (LDM, arXiv 2112.10752, appendix G)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.schedule import at_least_float32
from ..errors import LatentDiffError, check_choice
from ..evaluation.metrics import ssim_map
from .perceptual import PerceptualLoss

Reconstruction = Literal["l1", "l2"]
WINDOW = 7  # pixels a side, in StructuralLoss
MAX_SCALES = 5  # as in MS-SSIM


def reconstruction_nll(
    pixels: Tensor,
    reconstruction: Tensor,
    log_variance: Tensor,
    kind: Reconstruction = "l1",
    perceptual: Tensor | None = None,
) -> Tensor:
    """Compute the negative log-likelihood, (B,): error / exp(log_variance) + log_variance, summed over all values.

    As in LDM, up to constants. With l1, |x - y|, it is that of a Laplace distribution of scale exp(log_variance), in
    nats; with l2, (x - y)^2, twice that of a normal distribution of variance exp(log_variance). In either case the
    minimum over log_variance is where exp(log_variance) is the mean error.

    Pixels and reconstruction are (B, C, H, W) in [-1, 1]. `log_variance` is (), one learned number for all pixels that
    LDM initializes to 0. `perceptual` is (B,), already weighted, and added to the error of every value, as in LDM.
    """
    check_choice("reconstruction loss", kind, ("l1", "l2"))
    if pixels.shape != reconstruction.shape:
        raise LatentDiffError(f"pixels have shape {tuple(pixels.shape)}, reconstruction {tuple(reconstruction.shape)}")
    difference = at_least_float32(pixels) - at_least_float32(reconstruction)
    error = difference.abs() if kind == "l1" else difference.square()
    total = error.flatten(1).sum(1)
    num_values = error[0].numel()
    if perceptual is not None:
        total = total + num_values * perceptual
    return total / log_variance.exp() + num_values * log_variance


def adaptive_weight(reconstruction_grad: Tensor, generator_grad: Tensor, limit: float = 1e4) -> Tensor:
    """Compute VQGAN's adaptive weight lambda (arXiv 2012.09841, equation 7), which balances the two gradients.

    It is |reconstruction_grad| / (|generator_grad| + 1e-4), at most `limit`: (), detached and never read by the host.
    Both gradients are those of the decoder's last layer, `vae.decoder.conv_out.weight`, averaged over all processes.
    The 1e-4 is from the paper's code; its text has 1e-6.
    """
    reconstruction_norm, generator_norm = (
        torch.linalg.vector_norm(at_least_float32(grad.detach())) for grad in (reconstruction_grad, generator_grad)
    )
    return (reconstruction_norm / (generator_norm + 1e-4)).clamp(max=limit)


def load_perceptual(path: str | None) -> tuple[nn.Module, str]:
    """Return LPIPS if given weights, else `StructuralLoss`, in eval mode, and a sentence that says which and why.

    If `path` cannot be loaded (see `PerceptualLoss.from_pretrained`), it raises rather than silently change the loss.
    """
    if path is None:
        return StructuralLoss().eval(), "Perceptual loss: 1 - multi-scale SSIM, because no LPIPS weights are given."
    return PerceptualLoss.from_pretrained(path), f"Perceptual loss: LPIPS (VGG16) with weights from {path}."


class StructuralLoss(nn.Module):
    """1 - SSIM, averaged over the image and over scales, each half the size of the previous one.

    Like MS-SSIM (Wang et al. 2003, doi 10.1109/ACSSC.2003.1292216), but with a mean over scales: its product of powers
    has no finite gradient where a factor is 0 and is undefined where one is negative. Box windows instead of Gaussian
    ones are cheap on CPUs, and on GPUs pooling never rounds to TF32, which is too coarse for SSIM's small differences.
    """

    def forward(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
        """Map two batches (B, C, H, W) in [-1, 1] to (B,): 0 for equal images, 1 for unrelated ones, at most 2."""
        if min(pixels.shape[2:]) < WINDOW:
            raise LatentDiffError(f"pixels are {tuple(pixels.shape[2:])}; the loss needs at least {WINDOW} a side")
        x, y = ((at_least_float32(image) + 1.0) / 2.0 for image in (pixels, reconstruction))
        losses: list[Tensor] = []
        while len(losses) < MAX_SCALES and min(x.shape[2:]) >= WINDOW:
            losses.append(1.0 - ssim_map(x, y, _box).mean((1, 2, 3)))
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return torch.stack(losses).mean(0)


def _box(x: Tensor) -> Tensor:
    """Means over all windows that lie within the image."""
    return F.avg_pool2d(x, WINDOW, stride=1)
