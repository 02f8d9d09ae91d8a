"""CUDA graphs for drawing: one launch for a whole network instead of several hundred.

A small network computes faster than Python launches its kernels. A CUDA graph records the kernels of one call and
repeats them on the same memory, so inputs are copied there, and results from there. Other devices are not concerned.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unet import Denoiser, Experts, UNet
from unet.experts import ExpertContext, call_expert
from unet.trajectory import History
from vae import VAE

from .loop import Network

MAX_PIXELS = 64 * 1024  # latent pixels of a batch; more keep a GPU busy anyway, and would hold much memory
MAX_DECODED = 4 * 1024  # latent pixels to decode at once, likewise
MAX_GRAPHS = 16  # functions and shapes of their inputs
PER_EXPERT = 4  # of them: a prompt's features and a step, each with guidance and without
WARM_UP = 2  # calls before the one that is recorded: whatever is created once

Function = Callable[[list[Tensor]], list[Tensor]]


class Graph(NamedTuple):
    """A recorded call, and the memory that it reads and writes."""

    recorded: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: list[Tensor]


class Graphs:
    """Calls functions of tensors, from CUDA graphs where those are faster.

    A graph belongs to the addresses of the weights, not to their values, and is recorded once per shape of the inputs.
    Functions run as they are on other devices, where gradients are wanted, and if a model has hooks.
    """

    def __init__(self) -> None:
        self.recorded: OrderedDict[Hashable, Graph] = OrderedDict()
        self.pool: Any = None  # memory that all graphs share: no two run at the same time, and results are copied
        self.lock = threading.Lock()
        self.latest: tuple[Graph | None, Any] = None, None  # the graph that ran last, and its constant
        self.enabled = True

    def __reduce__(self) -> tuple[type["Graphs"], tuple[()]]:
        """A copy, or what is read from a pickle, has yet to record its graphs."""
        return Graphs, ()

    def __call__(
        self,
        name: str,
        model: Hashable,
        function: Function,
        inputs: list[Tensor],
        constant: tuple[Any, list[Tensor]] = (None, []),
    ) -> list[Tensor]:
        """Return `function(inputs)`, where the tensors of `constant` follow the inputs.

        `model` is what `describe` says of the model that the function calls. The tensors of `constant` are copied only
        if the object that comes with them is another than last time.
        """
        known, (token, others) = len(inputs), constant
        if not self.enabled or model is None or torch.is_grad_enabled():
            return function([*inputs, *others])
        with self.lock:  # the memory of a graph serves one call at a time
            graph = self._graph(name, model, function, [*inputs, *others])
            if graph is None:
                return function([*inputs, *others])
            torch._foreach_copy_(graph.inputs[:known], inputs)
            if others and (self.latest[0] is not graph or self.latest[1] is not token):
                torch._foreach_copy_(graph.inputs[known:], others)
                self.latest = graph, token
            graph.recorded.replay()
            return [result.clone() for result in graph.results]

    def _graph(self, name: str, model: Hashable, function: Function, inputs: list[Tensor]) -> Graph | None:
        shapes = tuple((each.shape, each.dtype) for each in inputs)
        key = name, model, shapes, torch.is_autocast_enabled("cuda")
        if key not in self.recorded:
            try:
                self.recorded[key] = self._record(function, inputs)
            except RuntimeError as error:
                self.enabled = False
                warnings.warn(f"drawing without CUDA graphs: {str(error)[:200]}", RuntimeWarning, stacklevel=4)
                return None
            while len(self.recorded) > MAX_GRAPHS:
                self.recorded.popitem(last=False)
        self.recorded.move_to_end(key)
        return self.recorded[key]

    def _record(self, function: Function, inputs: list[Tensor]) -> Graph:
        device, inputs = inputs[0].device, [each.clone() for each in inputs]
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function(inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            recorded = torch.cuda.CUDAGraph()
            # Other threads, such as a DataLoader's, may use the GPU meanwhile.
            with torch.cuda.graph(recorded, pool=self.pool, capture_error_mode="thread_local"):
                results = function(inputs)
        return Graph(recorded, inputs, results)


class GraphedUNet:
    """A `Network` that is called like its UNet and returns the same, from CUDA graphs unless the batch is large.

    Steps with a history, which grows, run as they are.
    """

    def __init__(self, unet: UNet, graphs: Graphs) -> None:
        self.unet, self.graphs = unet, graphs
        self.model: Hashable = None

    def project_context(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """See `UNet.project_context`; called once per sampling, so it also looks at what has become of the UNet."""
        self.model = describe(self.unet, context.device)

        def project(inputs: list[Tensor]) -> list[Tensor]:
            return [tensor for pair in self.unet.project_context(inputs[0]) for tensor in pair]

        return _pairs(self.graphs("context", self.model, project, [context]))

    def project_time(self, t: Tensor) -> list[Tensor]:
        """See `UNet.project_time`."""
        return self.graphs("time", self.model, lambda inputs: self.unet.project_time(inputs[0]), [t])

    def start_history(self) -> History | None:
        """See `UNet.start_history`."""
        return self.unet.start_history()

    def __call__(self, x: Tensor, t: Any, context: Any, history: History | None = None, /) -> Any:
        """See `UNet.forward`; `t` and `context` are projections."""
        if history is not None:
            return self.unet(x, t, context, history)
        if len(x) * x.shape[2] * x.shape[3] > MAX_PIXELS or isinstance(t, Tensor) or isinstance(context, Tensor):
            return self.unet(x, t, context)

        def predict(inputs: list[Tensor]) -> list[Tensor]:
            times, pairs = inputs[1 : 1 + len(t)], _pairs(inputs[1 + len(t) :])
            return [self.unet(inputs[0], times, pairs)]

        x = x.contiguous(memory_format=torch.channels_last)
        constant = context, [tensor for pair in context for tensor in pair]
        return self.graphs("step", self.model, predict, [x, *t], constant)[0]


class ExpertNetwork:
    """A `Network` that is called like its experts, each by a function of its own, such as `GraphedUNet`."""

    def __init__(self, experts: Experts, members: Sequence[Network]) -> None:
        self.experts, self.members = experts, members

    def project_context(self, context: Tensor) -> ExpertContext:
        """See `Experts.project_context`."""
        return ExpertContext(self.members, context)

    def project_time(self, t: Tensor) -> list[Tensor]:
        """See `Experts.project_time`."""
        return self.experts.project_time(t)

    def start_history(self) -> None:
        """See `Experts.start_history`."""

    def __call__(self, x: Tensor, t: Any, context: Any, history: None = None, /) -> Tensor:
        """See `Experts.forward`."""
        return self.experts(x, t, context) if isinstance(t, Tensor) else call_expert(self.members, x, t, context)


def graphed(unet: Denoiser, graphs: Graphs) -> Network:
    """Return what is called like the UNet or the experts, from CUDA graphs unless there would be too many."""
    if not isinstance(unet, Experts):
        return GraphedUNet(unet, graphs)
    if len(unet.members) * PER_EXPERT > MAX_GRAPHS:
        return unet
    return ExpertNetwork(unet, [GraphedUNet(each, graphs) for each in unet.members])


def decode(graphs: Graphs, vae: VAE, latents: Tensor) -> Tensor:
    """Decode latents (B, c, h, w), from a CUDA graph unless there are many."""
    if latents[:, 0].numel() > MAX_DECODED or latents.device.type != "cuda":
        return vae.decode(latents)
    return graphs("decode", describe(vae, latents.device), lambda inputs: [vae.decode(inputs[0])], [latents])[0]


def describe(model: nn.Module, device: torch.device) -> Hashable:
    """Return the addresses of the weights and the attention functions; None on a CPU, or if there are hooks."""
    modules = list(model.modules()) if device.type == "cuda" else []
    if not modules or any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return None
    weights = tuple((parameter.data_ptr(), parameter.dtype) for parameter in model.parameters())
    return weights, tuple(module.attend for module in modules if hasattr(module, "attend"))


def _pairs(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))
