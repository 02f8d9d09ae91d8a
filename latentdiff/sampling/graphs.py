"""The denoising network as CUDA graphs: at every step one launch instead of several hundred.

A small UNet computes faster than Python launches its kernels. A CUDA graph records the kernels of one call and repeats
them on the same memory, so inputs are copied there, and the result from there. Other devices are not concerned.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unet import UNet

MAX_PIXELS = 64 * 1024  # latent pixels of a batch; more keep a GPU busy anyway, and would hold much memory
MAX_GRAPHS = 8  # shapes of inputs
WARM_UP = 2  # calls before the one that is recorded: whatever is created once


class Graph(NamedTuple):
    """A recorded call, and the memory that it reads and writes."""

    recorded: torch.cuda.CUDAGraph
    x: Tensor
    times: list[Tensor]
    context: list[Tensor]
    result: Tensor


class GraphedUNet:
    """A `Network` that is called like its UNet and returns the same, from CUDA graphs where those are faster.

    Graphs belong to the addresses of the weights, not to their values, and are recorded once per shape of the inputs.
    The UNet runs as it is on other devices, for large batches, where gradients are wanted, and if it has hooks.
    """

    def __init__(self, unet: UNet) -> None:
        self.unet = unet
        self.graphs: OrderedDict[Any, Graph] = OrderedDict()
        self.pool: Any = None  # memory that all graphs share: no two run at the same time, and results are copied
        self.lock = threading.Lock()
        self.latest: tuple[Graph | None, Any] = None, None  # the graph that ran last, and its context
        self.model: Any = None  # what graphs depend on beside the shapes; None: no graphs

    def project_context(self, context: Tensor) -> Any:
        """See `UNet.project_context`."""
        return self.unet.project_context(context)

    def project_time(self, t: Tensor) -> Sequence[Tensor]:
        """See `UNet.project_time`; called once per sampling, so it also looks at what has become of the UNet."""
        self.model = self._describe_model() if t.device.type == "cuda" else None
        return self.unet.project_time(t)

    def __call__(self, x: Tensor, t: Any, context: Any, /) -> Tensor:
        """See `UNet.forward`."""
        eager = self.model is None or x.device.type != "cuda" or isinstance(t, Tensor) or isinstance(context, Tensor)
        if eager or torch.is_grad_enabled() or len(x) * x.shape[2] * x.shape[3] > MAX_PIXELS:
            return self.unet(x, t, context)
        flat = [tensor for pair in context for tensor in pair]
        with self.lock:  # the memory of a graph serves one call at a time
            graph = self._graph(x, t, context, flat)
            if graph is None:
                return self.unet(x, t, context)
            graph.x.copy_(x)
            torch._foreach_copy_(graph.times, t)
            if self.latest[0] is not graph or self.latest[1] is not context:
                torch._foreach_copy_(graph.context, flat)
                self.latest = graph, context
            graph.recorded.replay()
            return graph.result.clone()

    def _graph(self, x: Tensor, times: Sequence[Tensor], context: Any, flat: list[Tensor]) -> Graph | None:
        key = self.model, x.shape, x.dtype, len(times[0]), flat[0].shape, torch.is_autocast_enabled("cuda")
        if key not in self.graphs:
            try:
                self.graphs[key] = self._record(x, times, context)
            except RuntimeError as error:
                self.model = None
                warnings.warn(f"the UNet runs without CUDA graphs: {str(error)[:200]}", RuntimeWarning, stacklevel=3)
                return None
            while len(self.graphs) > MAX_GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def _record(self, x: Tensor, times: Sequence[Tensor], context: Any) -> Graph:
        x = x.clone(memory_format=torch.channels_last)
        times, context = [time.clone() for time in times], [(k.clone(), v.clone()) for k, v in context]
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.unet(x, times, context)
            torch.cuda.current_stream().wait_stream(stream)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            recorded = torch.cuda.CUDAGraph()
            # Other threads, such as a DataLoader's, may use the GPU meanwhile.
            with torch.cuda.graph(recorded, pool=self.pool, capture_error_mode="thread_local"):
                result = self.unet(x, times, context)
        return Graph(recorded, x, times, [tensor for pair in context for tensor in pair], result)

    def _describe_model(self) -> Any:
        """Return the addresses of the weights and the attention functions, or None if there are hooks."""
        modules = list(self.unet.modules())
        if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
            return None
        attends = tuple(module.attend for module in modules if hasattr(module, "attend"))
        return tuple(_address(parameter) for parameter in self.unet.parameters()), attends


def _address(parameter: nn.Parameter) -> tuple[int, torch.dtype]:
    return parameter.data_ptr(), parameter.dtype
