"""A module on several processes: as it is, DDP, or FSDP where the launcher asks for it; and its parameters there."""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..sections import TrainSection
from .launch import Launch, wants_fsdp


def sharded(module: nn.Module, run: Launch, section: TrainSection) -> nn.Module:
    """The module on its device, its parameters sharded where the launcher asks for FSDP, else as `distributed`.

    accelerate's own preparation shards on GPUs only; torch's does on CPUs too, which is how it is tested. Only a call
    of the whole module gathers its parameters: not of a part of it, and not of another method. They are freed after
    every pass, whatever the launcher says: the average could not be swapped in otherwise.

    """
    if not wants_fsdp(run.accelerator):
        return distributed(module, run, section)
    # fully_shard refuses channels-last parameters; the activations stay channels-last.
    module.to(run.device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    mesh = init_device_mesh(run.device.type, (run.accelerator.num_processes,))
    for layers in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
        for layer in layers:
            if not any(isinstance(part, nn.ModuleList) for part in layer.modules()):
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


def distributed(module: nn.Module, run: Launch, section: TrainSection) -> nn.Module:
    """The module on its device, in DDP where there are several processes; its parameters are reachable as before."""
    module.to(run.device)
    wrapped = module
    if run.accelerator.num_processes > 1:
        for parameter in module.parameters():  # a 1x1 kernel is the same in both layouts; DDP looks at its strides
            if parameter.dim() == 4 and parameter.shape[2:] == (1, 1):
                parameter.data = parameter.data.as_strided(parameter.shape, (parameter.shape[1], 1, 1, 1))
        # The same layout under two spellings of the strides of a dimension of length 1.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        devices = [run.device.index] if run.device.type == "cuda" else None
        wrapped = DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
    return torch.compile(wrapped) if section.compile else wrapped  # type: ignore[return-value]


def no_sync(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Let DDP exchange gradients in the last micro-batch only."""
    inner = getattr(module, "_orig_mod", module)
    if isinstance(inner, DistributedDataParallel) and not last:
        return inner.no_sync()
    return nullcontext()


def local_shard(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that lies here, sharing its memory."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach().requires_grad_()
    return parameter


def gather_full(parameter: nn.Parameter, part: Tensor | None = None) -> Tensor:
    """A parameter, or what belongs to it element by element, gathered from all processes; `part` is what lies here."""
    part = local_shard(parameter).detach() if part is None else part
    if not isinstance(parameter, DTensor):
        return part
    sharded = DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    return sharded.full_tensor().cpu()
