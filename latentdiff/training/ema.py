"""Power-function EMA of the weights (arXiv 2312.02696), whose window grows with the training run.

After step t the average is the sum over steps i of w_i * weights_i with

    w_i = (i / t)^(gamma + 1) - ((i - 1) / t)^(gamma + 1)                               (section 3.1)

so the initial weights leave no trace, and the width of the window is a fixed fraction, sigma_rel, of the run so far.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..errors import LatentDiffError

# Two lengths from which snapshots give all others (section 3.2), by the names of their files.
TRACKED = {"ema_050": 0.05, "ema_100": 0.10}
MAX_SIGMA_REL = 12**-0.5  # at gamma = 0, the plain mean of all weights so far


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Return the exponent gamma whose window has the relative standard deviation `sigma_rel` (appendix C.1).

    Solves sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2), a cubic in gamma, for its largest root.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise LatentDiffError(f"sigma_rel={sigma_rel!r}: must be a number between 0 and {MAX_SIGMA_REL:.3f}, e.g. 0.1")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class EMA:
    """Moving average of parameters, or of this process's shards of them.

    `tensors` holds the averages in the order of the parameters, in float32, on the same devices and in the same memory
    format. To resume, copy the saved averages into them.
    """

    def __init__(self, parameters: Sequence[Tensor], sigma_rel: float) -> None:
        self.gamma = gamma_from_sigma_rel(sigma_rel)
        self._parameters = [parameter.detach() for parameter in parameters]
        self.tensors = [parameter.to(torch.float32, copy=True) for parameter in self._parameters]
        # -0 + 0 is +0. With no -0 at the start none can arise, so adding zero never changes a bit.
        torch._foreach_add_(self.tensors, 0.0)

    @torch.no_grad()
    def update(self, step: int, step_is_finite: Tensor | None = None) -> None:
        """Update the average after a step, counted from 1; at step 1 it becomes the parameters themselves.

        `step_is_finite` is () on the parameters' device and never read by the host. If it is 0, the step was skipped,
        and not a bit of the average changes. The parameters must be finite even then, because zero times NaN is NaN;
        they are if the optimizer skipped the step, too.
        """
        if step < 1:
            raise LatentDiffError(f"step={step}: steps are counted from 1")
        weight = self._lerp_weight(step) if step_is_finite is None else self._lerp_weight(step) * step_is_finite
        if self.tensors[0].device.type == "cpu":  # bound by memory bandwidth: one pass instead of three
            for average, parameter in zip(self.tensors, self._parameters, strict=True):
                average.lerp_(parameter, weight)
            return
        differences = torch._foreach_sub(self._parameters, self.tensors)
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(self.tensors, differences)

    def copy_to(self, parameters: Sequence[Tensor]) -> None:
        """Write the average into tensors of the same shapes, cast to their dtypes."""
        _copy(parameters, self.tensors)

    @contextmanager
    def swapped(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Make the parameters hold the average inside the `with` block; their own values are then restored exactly."""
        own = [parameter.detach().clone() for parameter in parameters]
        try:
            self.copy_to(parameters)
            yield
        finally:
            _copy(parameters, own)

    def _lerp_weight(self, step: int) -> float:
        """1 - beta(step), with beta(t) = (1 - 1/t)^(gamma + 1); subtracting directly would lose digits at large t."""
        return 1.0 if step == 1 else -math.expm1((self.gamma + 1) * math.log1p(-1 / step))


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if len(targets) != len(sources):
        raise LatentDiffError(f"got {len(targets)} tensors for an average of {len(sources)}")
    torch._foreach_copy_([target.detach() for target in targets], list(sources))
