"""Guidance: wrappers round a model that strengthen the prompt. Samplers know nothing of it.

A model here is a callable (x, t) -> prediction, of any kind (eps, x0, v): guidance is linear and its weights sum to
one, so `guide` gives the same pictures whichever kind it wraps. `rescale` depends on it; the paper's numbers, and
diffusers' `guidance_rescale`, are for the network's own prediction.
"""

from collections.abc import Callable

from torch import Tensor

from ..errors import LatentDiffError
from .schedule import Schedule

Model = Callable[[Tensor, int], Tensor]  # (x, t) -> prediction
Pair = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (x, t) -> prediction with the prompt, and without


def guide(pair: Pair, scale: float, *, rescale: float = 0.0) -> Model:
    """Classifier-free guidance: uncond + scale * (cond - uncond) (arXiv 2207.12598, equation 6 with scale = 1 + w).

    Args:
        pair: predictions with the prompt and without it, usually one call of the network on a doubled batch.
        scale: 1 is off, 0 ignores the prompt; any finite number.
        rescale: 0 to 1: how far the result's standard deviation, picture by picture, is brought back to that of the
            prediction with the prompt (arXiv 2305.08891, equations 14 to 16; 0.7 there).

    Raises:
        LatentDiffError: a number out of range.
    """
    if not -float("inf") < scale < float("inf"):
        raise LatentDiffError(f"guidance_scale={scale!r}: expected a finite number; 1 is off")
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


def push(model: Model, pair: Pair, amount: float) -> Model:
    """The model's prediction moved along the difference of two others: `amount` times (first - second) is added."""

    def pushed(x: Tensor, t: int) -> Tensor:
        more, less = pair(x, t)
        return model(x, t) + amount * (more - less)

    return pushed


def within(inside: Model, outside: Model, low: float, high: float, schedule: Schedule) -> Model:
    """`inside` at noise levels low < sigma/alpha <= high, `outside` elsewhere (arXiv 2404.07724, equation 5).

    With a guided model inside and the prompt alone outside this is guidance in an interval: better pictures, and half
    the network calls where guidance is off.

    Raises:
        LatentDiffError: not 0 <= low < high.
    """
    if not 0 <= low < high:
        raise LatentDiffError(
            f"guidance interval ({low!r}, {high!r}): expected 0 <= low < high, in units of sigma/alpha"
        )
    level = (schedule.sigma / schedule.alpha).tolist()  # infinite where there is no signal
    return lambda x, t: inside(x, t) if low < level[round(t)] <= high else outside(x, t)
