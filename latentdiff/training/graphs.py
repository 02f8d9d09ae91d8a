"""Forward and backward passes as a CUDA graph: one launch where there would be thousands.

A GPU computes the gradients of a small model faster than Python launches its kernels. A CUDA graph records the kernels
of one step and repeats them on the same memory: inputs are copied there, and gradients always lie in the same place.
"""

import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..sections import TrainSection
from .launch import Launch
from .optimizer import TrainState

Parts = list[tuple[Tensor, ...]]  # the tensors of each micro-batch
Gradients = Callable[[Parts], dict[str, Tensor]]  # leaves gradients in the weights, returns scalars
SHARE = 1 / 3  # of the GPU's memory: a model that needs more in a step keeps the GPU busy anyway


class Recorded(NamedTuple):
    """A recorded step, and the memory that it reads and writes."""

    key: Hashable
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    gradients: list[Tensor | None]
    metrics: dict[str, Tensor]


class GradientGraph:
    """Computes gradients as it is told to, from a CUDA graph where that is faster.

    That is on one NVIDIA GPU, without torch.compile, if a step takes less than a third of the memory. The second step
    in a row with inputs of the same shapes is recorded; steps of other shapes run as they are.
    """

    def __init__(self, run: Launch, section: TrainSection, states: Mapping[str, TrainState]) -> None:
        alone = run.device.type == "cuda" and run.accelerator.num_processes == 1
        self.enabled = alone and not section.compile and section.cuda_graph
        self.device = run.device
        self.parameters = [parameter for state in states.values() for parameter in state.parameters.values()]
        self.recorded: Recorded | None = None
        self.latest: Hashable = None  # key of the latest step that ran as it is

    def __call__(self, compute: Gradients, parts: Parts, kind: Hashable = None) -> dict[str, Tensor]:
        """Call `compute(parts)`, which leaves gradients in the weights; return its metrics.

        `kind` is whatever else decides what is computed.
        """
        if not self.enabled:
            return compute(parts)
        inputs = [tensor for part in parts for tensor in part]
        key = kind, tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if self.recorded is None or self.recorded.key != key:
            if key != self.latest:
                self.latest = key
                return self._measured(compute, parts)
            try:
                self.recorded = self._record(compute, parts, key)
            except RuntimeError as error:
                self.enabled = False
                for parameter in self.parameters:
                    parameter.grad = None
                warnings.warn(f"training runs without CUDA graphs: {str(error)[:200]}", RuntimeWarning, stacklevel=3)
                return compute(parts)
        recorded = self.recorded
        torch._foreach_copy_(recorded.inputs, inputs, non_blocking=True)
        recorded.graph.replay()
        for parameter, gradient in zip(self.parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in recorded.metrics.items()}

    def _measured(self, compute: Gradients, parts: Parts) -> dict[str, Tensor]:
        """Compute without a graph, and find out whether the next step may be recorded."""
        torch.cuda.reset_peak_memory_stats(self.device)
        metrics = compute(parts)
        total = torch.cuda.get_device_properties(self.device).total_memory
        self.enabled = torch.cuda.max_memory_allocated(self.device) <= SHARE * total
        return metrics

    def _record(self, compute: Gradients, parts: Parts, key: Hashable) -> Recorded:
        """Record a step without taking it."""
        self.recorded = None  # frees its memory
        static = [tuple(tensor.clone() for tensor in part) for part in parts]
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            compute(static)  # whatever is created once per stream
        torch.cuda.current_stream(self.device).wait_stream(stream)
        for parameter in self.parameters:
            parameter.grad = None  # so that the recorded backward pass writes gradients instead of adding to them
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads load data meanwhile
            metrics = compute(static)
        gradients = [parameter.grad for parameter in self.parameters]
        return Recorded(key, graph, [tensor for part in static for tensor in part], gradients, metrics)
