"""Experts: several UNets of one shape, each responsible for a band of timesteps.

With edges 0 = e_0 < e_1 < ... < e_N = T, expert i predicts where e_i <= t < e_{i+1}. A fractional t goes with the
timestep below it, one below 0 with the first expert, and one above T - 1 with the last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import KeyValue
from .blocks import Context
from .config import UNetConfig
from .errors import UNetError
from .model import UNet


def band_edges(experts: int | Sequence[int], num_timesteps: int) -> tuple[int, ...]:
    """Return the edges 0, ..., T of the bands: of `experts` bands as equal as can be, or those between given edges.

    Raises UNetError unless every band has at least one of the T timesteps.
    """
    T = num_timesteps
    if isinstance(experts, int):
        if not 1 <= experts <= T:
            raise UNetError(f"experts={experts}: expected 1 to {T}, as there are {T} timesteps")
        return tuple(index * T // experts for index in range(experts + 1))
    edges = (0, *experts, T)
    if not experts or any(below >= above for below, above in pairwise(edges)):
        raise UNetError(f"experts={list(experts)}: expected increasing timesteps from 1 to {T - 1}, where one expert "
                        "takes over from another")  # fmt: skip
    return edges


class Calls(NamedTuple):
    """Which experts predict which rows of a batch. It is known without looking at a tensor on the device."""

    order: tuple[int, ...] | None  # the rows, sorted by expert; None: they are in that order
    counts: tuple[tuple[int, int], ...]  # (expert, number of its rows), ascending; with 0 rows, called all the same


class Experts(nn.Module):
    """UNets of one shape that are called like one; each predicts in its own band of timesteps."""

    def __init__(self, unets: Iterable[UNet], edges: Sequence[int]) -> None:
        """Combine one UNet for each of the bands that `band_edges` returns."""
        super().__init__()
        self.unets = nn.ModuleList(unets)
        self.edges = tuple(edges)
        if len(self.unets) != len(edges) - 1 or len({unet.config for unet in self.members}) != 1:
            raise UNetError(f"{len(self.unets)} UNets for {len(edges) - 1} bands: expected as many, of one shape")
        if self.config.trajectory_attention:
            raise UNetError("experts of UNets with trajectory_attention: one cannot look back at what another computed")

    @property
    def members(self) -> list[UNet]:
        """The UNets, in the order of their bands."""
        return list(self.unets)  # type: ignore[arg-type]

    @property
    def config(self) -> UNetConfig:
        """The config of every one of the UNets."""
        return self.members[0].config

    @property
    def conv_in(self) -> nn.Conv2d:
        """The first layer of the first UNet: its weights have the dtype and the device of all."""
        return self.members[0].conv_in

    def expert_at(self, t: float) -> int:
        """Return which expert is responsible for a timestep."""
        return bisect_right(self.edges[1:-1], t)

    def experts_at(self, t: Tensor) -> list[int]:
        """Return the experts for timesteps (B,). Without values, on the meta device, they are spread evenly."""
        if t.is_meta:
            return [row * len(self.unets) // len(t) for row in range(len(t))]
        return [self.expert_at(value) for value in t.tolist()]

    def calls(self, t: Tensor, also: Collection[int] = ()) -> Calls:
        """Return the calls for timesteps (B,), best on the CPU; those of `also` are called even without a row."""
        experts = self.experts_at(t)
        rows = sorted(range(len(experts)), key=experts.__getitem__)
        order = None if rows == list(range(len(experts))) else tuple(rows)
        return Calls(order, tuple((expert, experts.count(expert)) for expert in sorted({*experts, *also})))

    def forward(self, x: Tensor, t: Tensor | Sequence[Tensor], context: Any, calls: Calls | None = None) -> Tensor:
        """Predict as `UNet.forward` does, every row by the expert of its timestep.

        Args:
            x: noisy latents (B, in_channels, H, W).
            t: timesteps (B,), or () for the entire batch; or one step of `project_time`'s result.
            context: text features (B, L, D), or `project_context`'s result for them.
            calls: what `calls` returns for these timesteps; None looks at them, for which the host waits for a device.
        """
        if not isinstance(t, Tensor):
            return call_expert(self.members, x, t, context)
        features = context.features if isinstance(context, ExpertContext) else context
        if t.numel() > 1 and t.shape != x.shape[:1]:
            raise UNetError(f"t has shape {tuple(t.shape)}; expected () or ({len(x)},)")
        calls = calls or self.calls(t.reshape(-1))
        if len(calls.counts) == 1:  # x may have more rows than t
            return self.members[calls.counts[0][0]](x, t, features)
        if calls.order is None:
            return self._predict(x, t, features, calls)
        order = torch.tensor(calls.order, device=x.device)
        return self._predict(x[order], t[order], features[order], calls)[order.argsort()]

    def project_context(self, context: Tensor) -> ExpertContext:
        """Keep text features (B, L, D) for `forward`: see `ExpertContext`."""
        return ExpertContext(self.members, context)

    def project_time(self, t: Tensor) -> list[Tensor]:
        """Compute what each expert's ResBlocks add at its timesteps (S,), as `UNet.project_time`; also whose they are.

        Returns a list of (S, C) tensors, and last the experts (S,) on the CPU, where `forward` can read them at once.
        """
        if t.dim() != 1:
            raise UNetError(f"t has shape {tuple(t.shape)}; expected (S,), one timestep per step")
        experts = self.experts_at(t)
        rows = [self.members[expert].project_time(row) for expert, row in zip(experts, torch.split(t, 1), strict=True)]
        return [*map(torch.cat, zip(*rows, strict=True)), torch.tensor(experts, device="cpu")]

    def start_history(self) -> None:
        """See `UNet.start_history`; experts have none."""

    def set_attention_backend(self, name: str) -> None:
        """See `UNet.set_attention_backend`."""
        for unet in self.members:
            unet.set_attention_backend(name)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """See `UNet.enable_gradient_checkpointing`."""
        for unet in self.members:
            unet.enable_gradient_checkpointing(enabled)

    def _predict(self, x: Tensor, t: Tensor, context: Tensor, calls: Calls) -> Tensor:
        """Call the experts for rows that are sorted by expert."""
        outputs: list[Tensor] = []
        idle: list[Tensor] = []
        start = 0
        for expert, count in calls.counts:
            part = slice(start, start + count) if count else slice(1)
            output = self.members[expert](x[part], t[part], context[part])
            (outputs if count else idle).append(output)
            start += count
        return torch.cat(outputs + idle)[:start]  # all take part in the backward pass; the idle ones' gradients are 0


Denoiser = UNet | Experts


class ExpertContext:
    """Text features, from which the keys and values of an expert are computed when it is its turn.

    A schedule visits the bands one after the other, so they are computed once for each, and only one's are kept.
    """

    def __init__(self, members: Sequence[Any], features: Tensor) -> None:
        self.members, self.features = members, features
        self.latest: tuple[int, list[KeyValue]] | None = None

    def projected(self, expert: int) -> list[KeyValue]:
        """Return an expert's keys and values of the features."""
        if self.latest is None or self.latest[0] != expert:
            self.latest = expert, self.members[expert].project_context(self.features)
        return self.latest[1]


def call_expert(
    members: Sequence[Callable[..., Tensor]], x: Tensor, t: Sequence[Tensor], context: ExpertContext | Context
) -> Tensor:
    """Call one of several networks with one step of `Experts.project_time`, which says whose turn it is."""
    *shifts, experts = t
    expert = int(experts[0])
    if len(experts) > 1 and bool((experts != expert).any()):
        raise UNetError("t has projections of several experts; expected one step of project_time's result")
    return members[expert](x, shifts, context.projected(expert) if isinstance(context, ExpertContext) else context)


def new_denoiser(config: UNetConfig, edges: Sequence[int] | None) -> Denoiser:
    """Create a UNet, or if there are edges of bands an expert for each."""
    return UNet(config) if edges is None else Experts((UNet(config) for _ in edges[1:]), edges)


def edges_of(unet: Denoiser) -> tuple[int, ...] | None:
    """Return the edges of the experts' bands; None for a single UNet."""
    return unet.edges if isinstance(unet, Experts) else None
