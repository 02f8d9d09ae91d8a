"""Attention across the steps of a trajectory: what a step computes at a pixel is seen by the steps that follow it.

Shapes: B batch, N pixels, C channels, h heads, S steps attended to: this one and those before it, the latest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.norms import LayerNorm

BlockMemory = tuple[Tensor, Tensor]  # keys and values of one block, (B, N, C) each


class StepMemory(NamedTuple):
    """What is kept of an earlier, noisier step."""

    blocks: tuple[BlockMemory, ...]  # of every transformer block
    present: Tensor | None = None  # (B,) bool: which pictures of the batch have taken this step; None: all


@dataclass(frozen=True)
class History:
    """The earlier steps of a batch of trajectories, the latest first: `unet(x, t, context, history)` also returns it
    with the step that it takes. A trajectory begins with `History()`."""

    steps: tuple[StepMemory, ...] = ()

    def followed_by(self, blocks: Sequence[BlockMemory], most: int) -> History:
        """Return the history of the next step, which is at most as long as `most`."""
        return History((StepMemory(tuple(blocks)), *self.steps)[:most])

    def where(self, present: Tensor) -> History:
        """Return the history in which only some of the pictures have taken the latest step, by a mask (B,)."""
        return History((self.steps[0]._replace(present=present), *self.steps[1:]))

    def spread(self, rows: Tensor, batch: int) -> History:
        """Return the history of a larger batch, in which only the pictures at places `rows` (B,) have one."""

        def placed(part: Tensor) -> Tensor:
            return part.new_zeros(batch, *part.shape[1:]).index_copy(0, rows, part)

        def all_rows(step: StepMemory) -> StepMemory:
            present = torch.ones_like(rows, dtype=torch.bool) if step.present is None else step.present
            return StepMemory(tuple((placed(k), placed(v)) for k, v in step.blocks), placed(present))

        return replace(self, steps=tuple(map(all_rows, self.steps)))


@dataclass
class Trace:
    """One pass of the UNet: the history that its blocks attend to, and the keys and values that they add."""

    history: History
    added: dict[int, BlockMemory] = field(default_factory=dict)  # by block: a block that is recomputed adds the same

    def of(self, block: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Return a block's keys, values and mask of every earlier step."""
        return [(*step.blocks[block], step.present) for step in self.history.steps]


class TrajectoryAttention(nn.Module):
    """Multi-head attention of every pixel to itself, in this step and in up to `num_steps` earlier ones.

    Steps are told apart by how many steps ago they were: a learned vector each, added to the keys. The timestep is in
    the features already, by way of the ResBlocks. A new layer adds zero.
    """

    def __init__(self, width: int, num_heads: int, num_steps: int, index: int) -> None:
        super().__init__()
        self.num_heads, self.index = num_heads, index  # position among the UNet's transformer blocks
        self.norm = LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.steps_ago = nn.Parameter(torch.randn(1 + num_steps, width) * width**-0.5)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list as in `Attention`
        for parameter in self.to_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, trace: Trace) -> Tensor:
        """Attend from x (B, N, C) to this step and the history; leave this step's keys and values in `trace`."""
        h = self.norm(x)
        q, k, v = self._split(self.to_q(h)), self.to_k(h), self.to_v(h)  # q (B, N, h, C/h)
        trace.added[self.index] = k, v
        steps = [(k, v, None), *trace.of(self.index)]
        q = q * q.shape[3] ** -0.5
        ago = self.steps_ago[: len(steps)].to(q.dtype).view(len(steps), self.num_heads, -1)
        logits = torch.einsum("bnhd,shd->bnhs", q, ago)
        logits = logits + torch.stack([_masked((q * self._split(key)).sum(3), present) for key, _, present in steps], 3)
        weights = logits.softmax(3, dtype=torch.float32).to(v.dtype).unsqueeze(4).unbind(3)  # S x (B, N, h, 1)
        # One step at a time: PyTorch keeps what is multiplied for the backward pass, and so no copy of the history.
        out = sum((weight * self._split(value) for weight, (_, value, _) in zip(weights, steps, strict=True)),
                  start=q.new_zeros(()))  # fmt: skip
        return self.to_out[0](out.flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1)  # (B, N, C) -> (B, N, h, C/h)


def _masked(logits: Tensor, present: Tensor | None) -> Tensor:
    """Take a step's logits (B, N, h) out of the softmax for pictures that have not taken it."""
    return logits if present is None else logits.masked_fill(~present[:, None, None], -torch.inf)
