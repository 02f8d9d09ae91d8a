"""A moving average of weights whose memory grows with the training: the power function of arXiv 2312.02696.

After step t the average is the sum over steps i of w_i * weights_i with

    w_i = (i / t)^(gamma + 1) - ((i - 1) / t)^(gamma + 1)                               (section 3.1)

so the initial weights leave no trace, and the width of the window is a fixed share, sigma_rel, of the training so far.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..errors import LatentDiffError

WIDEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean of all weights so far


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent whose window has standard deviation `sigma_rel`, as a share of the training (appendix C.1).

    Solves sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2), a cubic in gamma, for its largest root.

    Raises:
        LatentDiffError: `sigma_rel` is not between 0 and 0.288.
    """
    if not 0 < sigma_rel < WIDEST:
        raise LatentDiffError(f"sigma_rel={sigma_rel!r}: expected a number between 0 and {WIDEST:.3f}, such as 0.1")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class EMA:
    """The average of some tensors: parameters, or the parts of them that lie on this process.

    `tensors` are the averages, in the order of the parameters: float32, on their devices, laid out in memory like them.
    To continue a training, copy what was saved into them.

    Raises:
        LatentDiffError: `sigma_rel` is out of range.
    """

    def __init__(self, parameters: Sequence[Tensor], sigma_rel: float) -> None:
        self.gamma = gamma_from_sigma_rel(sigma_rel)
        self._parameters = [parameter.detach() for parameter in parameters]
        self.tensors = [parameter.to(torch.float32, copy=True) for parameter in self._parameters]
        # -0 + 0 is +0. Without a -0 to begin with, none can arise, and adding zero changes no bit.
        torch._foreach_add_(self.tensors, 0.0)

    @torch.no_grad()
    def update(self, step: int, step_is_finite: Tensor | None = None) -> None:
        """Take in the parameters as they are after a step.

        Args:
            step: number of the step, counted from 1; at 1 the average becomes the parameters themselves.
            step_is_finite: () on the parameters' device; 1, or 0 where the step was skipped, and then no bit of the
                average changes. The host never reads it. The parameters must be finite all the same, as they are
                where the optimizer skipped the step too: zero times NaN is NaN.

        Raises:
            LatentDiffError: `step` is below 1.
        """
        if step < 1:
            raise LatentDiffError(f"step={step}: the average counts steps from 1")
        share = self._share(step) if step_is_finite is None else self._share(step) * step_is_finite
        if self.tensors[0].device.type == "cpu":  # memory is what limits it: one pass instead of three
            for average, parameter in zip(self.tensors, self._parameters, strict=True):
                average.lerp_(parameter, share)
            return
        differences = torch._foreach_sub(self._parameters, self.tensors)
        torch._foreach_mul_(differences, share)
        torch._foreach_add_(self.tensors, differences)

    def copy_to(self, parameters: Sequence[Tensor]) -> None:
        """Write the average into tensors of the same shapes, in their dtypes."""
        _copy(parameters, self.tensors)

    @contextmanager
    def swapped(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Within the `with`, the parameters hold the average; afterwards, their own values again, bit for bit."""
        own = [parameter.detach().clone() for parameter in parameters]
        try:
            self.copy_to(parameters)
            yield
        finally:
            _copy(parameters, own)

    def _share(self, step: int) -> float:
        """1 - beta(step), with beta(t) = (1 - 1/t)^(gamma + 1); 1 - beta itself would lose digits at a large t."""
        return 1.0 if step == 1 else -math.expm1((self.gamma + 1) * math.log1p(-1 / step))


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if len(targets) != len(sources):
        raise LatentDiffError(f"{len(targets)} tensors for an average of {len(sources)}")
    torch._foreach_copy_([target.detach() for target in targets], list(sources))
