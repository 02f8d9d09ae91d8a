"""The losses of the autoencoder's training (LDM, arXiv 2112.10752, appendix G) but the discriminator's."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.schedule import at_least_float32
from ..errors import LatentDiffError, check_choice
from ..evaluation.metrics import ssim_map
from .perceptual import PerceptualLoss

Reconstruction = Literal["l1", "l2"]
WINDOW = 7  # pixels a side, of StructuralLoss
MAX_SCALES = 5  # as many as MS-SSIM has


def reconstruction_nll(
    pixels: Tensor,
    reconstruction: Tensor,
    log_variance: Tensor,
    kind: Reconstruction = "l1",
    perceptual: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of the pixels, (B,): error / exp(log_variance) + log_variance, summed over all values.

    As in LDM, up to constants: with l1, |x - y|, that of a Laplace distribution of scale exp(log_variance), in nats;
    with l2, (x - y)^2, twice that of a normal distribution of variance exp(log_variance). Either is least where
    exp(log_variance) is the mean error, and is then an error relative to the average one.

    Args:
        pixels: (B, C, H, W) in [-1, 1].
        reconstruction: the same shape.
        log_variance: (), one learnt number for all pixels; LDM begins with 0.
        kind: of the error.
        perceptual: (B,), weighted already; added to the error of each of the picture's values, as in LDM.

    Raises:
        LatentDiffError: there is no such kind, or the shapes differ.
    """
    check_choice("reconstruction loss", kind, ("l1", "l2"))
    if pixels.shape != reconstruction.shape:
        raise LatentDiffError(f"pixels are {tuple(pixels.shape)}, reconstruction {tuple(reconstruction.shape)}")
    difference = at_least_float32(pixels) - at_least_float32(reconstruction)
    error = difference.abs() if kind == "l1" else difference.square()
    total = error.flatten(1).sum(1)
    num_values = error[0].numel()
    if perceptual is not None:
        total = total + num_values * perceptual
    return total / log_variance.exp() + num_values * log_variance


def adaptive_weight(reconstruction_grad: Tensor, generator_grad: Tensor, limit: float = 1e4) -> Tensor:
    """lambda of VQGAN (arXiv 2012.09841, equation 7): what makes the generator loss pull as hard as the reconstruction.

    Args:
        reconstruction_grad: gradient of the reconstruction loss with respect to the weight of the decoder's last layer,
            `vae.decoder.conv_out.weight`, averaged over all processes where there are several.
        generator_grad: that of the generator loss.
        limit: of the result.

    Returns:
        |reconstruction_grad| / (|generator_grad| + 1e-4), at most `limit`: (), detached, never read by the host. The
        1e-4 is that of the paper's code; its text has 1e-6.
    """
    reconstruction_norm, generator_norm = (
        torch.linalg.vector_norm(at_least_float32(grad.detach())) for grad in (reconstruction_grad, generator_grad)
    )
    return (reconstruction_norm / (generator_norm + 1e-4)).clamp(max=limit)


def load_perceptual(path: str | None) -> tuple[nn.Module, str]:
    """LPIPS where its weights are named, else `StructuralLoss`; and one sentence that says which, and why.

    Args:
        path: safetensors file or folder, see `PerceptualLoss.from_pretrained`; None: there are no weights.

    Returns:
        A module without trainable parameters, `(pixels, reconstruction) -> (B,)`, in evaluation mode; the sentence.

    Raises:
        LatentDiffError: a path is named and cannot be used. It is not replaced in silence: that is another training.
    """
    if path is None:
        return StructuralLoss().eval(), "Perceptual loss: 1 - multi-scale SSIM, because no LPIPS weights are named."
    return PerceptualLoss.from_pretrained(path), f"Perceptual loss: LPIPS (VGG16) with the weights of {path}."


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
