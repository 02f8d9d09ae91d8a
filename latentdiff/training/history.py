"""Predictions with a history: the noisier states of a chain are run first, without gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unet.trajectory import History

from ..data.batches import Chain
from ..diffusion.chain import forward_chain
from ..diffusion.schedule import Schedule

Predict = Callable[..., Any]  # (x_t, t, text, history) -> prediction and the next step's history


def predict_after_chain(
    predict: Predict, x_t: Tensor, t: Tensor, chain: Chain, text: Sequence[Tensor], schedule: Schedule
) -> Tensor:
    """Return the prediction at x_t (B, c, h, w), which sees the steps before it in those rows that have a chain.

    The others are masked, so that all are predicted by one call. `text` is what `FrozenParts.text` returns.
    """
    history = run_chain(predict, x_t, t, chain, text, schedule).spread(chain.rows, len(x_t))
    prediction: Tensor = predict(x_t, t, text, history)[0]
    return prediction


@torch.no_grad()
def run_chain(
    predict: Predict, x_t: Tensor, t: Tensor, chain: Chain, text: Sequence[Tensor], schedule: Schedule
) -> History:
    """Return the history of the rows that have a chain, from the noisiest state on, each seeing those before it."""
    x_t, t, *text = (part.index_select(0, chain.rows) for part in (x_t, t, *text))
    if len(text) > 1:  # tokens, which need to be encoded only once
        text = [predict(None, None, text)]
    states = forward_chain(x_t, t, chain.times, chain.noise, schedule)
    taken = chain.times.diff(dim=1, prepend=t[:, None]) > 0  # where a timestep is repeated, the chain has ended
    history = History()
    for state, s, present in reversed([*zip(states, chain.times.unbind(1), taken.unbind(1), strict=True)]):
        history = predict(state, s, text, history)[1].where(present)
    return history
