"""Guidance: wrappers that strengthen a model's conditioning. Samplers know nothing about them.

A model is a callable (x, t) -> prediction of any type (eps, x0, v). Guidance is linear with weights that sum to one,
so `guide` gives the same images for every prediction type. Only `rescale` depends on the type: the paper's values,
like diffusers' `guidance_rescale`, apply to the network's raw output.
"""

from collections.abc import Callable

from torch import Tensor

from ..errors import LatentDiffError
from .schedule import Schedule

Model = Callable[[Tensor, int], Tensor]  # (x, t) -> prediction
Pair = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (x, t) -> conditional and unconditional prediction


def guide(pair: Pair, scale: float, *, rescale: float = 0.0) -> Model:
    """Apply classifier-free guidance: uncond + scale * (cond - uncond) (arXiv 2207.12598, eq. 6 with scale = 1 + w).

    Args:
        pair: returns the conditional and the unconditional prediction, usually from one call on a doubled batch.
        scale: 1 disables guidance, 0 ignores the prompt; any finite number.
        rescale: 0 to 1: how far to pull each image's standard deviation back to that of the conditional prediction
            (arXiv 2305.08891, equations 14 to 16; the paper suggests 0.7).

    Raises:
        LatentDiffError: if a number is out of range.
    """
    if not -float("inf") < scale < float("inf"):
        raise LatentDiffError(f"guidance_scale={scale!r}: expected a finite number; 1 disables guidance")
    if not 0 <= rescale <= 1:
        raise LatentDiffError(f"guidance rescale={rescale!r}: expected a number from 0 to 1")

    def guided(x: Tensor, t: int) -> Tensor:
        cond, uncond = pair(x, t)
        result = uncond + scale * (cond - uncond)
        if rescale:
            dims = tuple(range(1, cond.dim()))
            ratio = cond.std(dims, keepdim=True) / result.std(dims, keepdim=True)
            result = result * (1 + rescale * (ratio - 1))
        return result

    return guided


def steer(model: Model, pair: Pair, amount: float) -> Model:
    """Add `amount` times the difference (first - second) of a pair of predictions to the model's own."""

    def steered(x: Tensor, t: int) -> Tensor:
        more, less = pair(x, t)
        return model(x, t) + amount * (more - less)

    return steered


def within(inside: Model, outside: Model, low: float, high: float, schedule: Schedule) -> Model:
    """Use `inside` at noise levels low < sigma/alpha <= high and `outside` elsewhere (arXiv 2404.07724, equation 5).

    With a guided model inside and the conditional model outside, this limits guidance to an interval: better images,
    and half the computation outside. Raises LatentDiffError unless 0 <= low < high.
    """
    if not 0 <= low < high:
        raise LatentDiffError(
            f"guidance interval ({low!r}, {high!r}): expected 0 <= low < high, in units of sigma/alpha"
        )
    level = (schedule.sigma / schedule.alpha).tolist()  # inf where alpha is 0
    return lambda x, t: inside(x, t) if low < level[round(t)] <= high else outside(x, t)
