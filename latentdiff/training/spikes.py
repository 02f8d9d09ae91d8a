"""Loss spikes: steps whose loss is far beyond its running mean, judged on the device, without waiting for it."""

import torch
from torch import Tensor

from .launch import Launch

NOTED = 1000.0  # times the mean, from which on a spike is noted
WINDOW, WARM_UP = 100.0, 10.0  # steps that the mean is over; steps before the first judgement
CLIP = 2.0  # times the mean: what a spike counts as in it
KEPT = 16  # spikes between two log lines that are remembered with their steps


class Spikes:
    """The running mean of the loss, which is part of a checkpoint, and the steps beyond it since the last log line."""

    def __init__(self, run: Launch, max_spike: float | None) -> None:
        """Skip steps with more than `max_spike` times the mean; None: only note those beyond 1,000 times."""
        self.run, self.max_spike = run, max_spike
        self.state = torch.zeros(2, device=run.device, dtype=torch.float64)  # mean, number of steps in it
        self.recent = torch.zeros(KEPT, 2, device=run.device, dtype=torch.float64)  # step, times the mean; newest first

    def accept(self, step: int, loss: Tensor, step_is_finite: Tensor) -> Tensor:
        """Return 1 if the step may update the weights, else 0, the same on all processes."""
        value = self.run.accelerator.reduce(loss.detach().double(), "mean")
        mean, count = self.state.unbind()
        ratio = value / mean.clamp(min=1e-12)
        usable = step_is_finite > 0
        is_spike = usable & (count >= WARM_UP) & (ratio > (self.max_spike or NOTED))
        # A spike moves the mean a little, so that a loss that stays high becomes the usual one in time.
        clipped = torch.where(is_spike, CLIP * mean, value)
        rate = usable.double() / (count + 1).clamp(max=WINDOW)
        self.state = torch.stack([mean + torch.where(usable, rate * (clipped - mean), 0.0), count + usable.double()])
        pushed = torch.cat([torch.stack([torch.full_like(ratio, step), ratio])[None], self.recent[:-1]])
        self.recent = torch.where(is_spike, pushed, self.recent)
        return step_is_finite * (~is_spike).to(step_is_finite) if self.max_spike is not None else step_is_finite

    def read(self) -> list[tuple[int, float]]:
        """Return the step and the multiple of the mean of the spikes since the last call; waits for the device."""
        found = [(int(step), ratio) for step, ratio in self.recent.tolist() if step]
        self.recent = torch.zeros_like(self.recent)
        return found[::-1]
