"""Data parallelism: wrapping modules in DDP or FSDP, and access to full and local parameters; evaluation mode."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from unet import Experts

from ..sections import TrainSection
from .launch import Launch, wants_fsdp


def sharded(module: nn.Module, run: Launch, section: TrainSection) -> nn.Module:
    """Shard a module with FSDP if the launcher requests it, otherwise prepare it with `distributed`.

    Uses torch's `fully_shard`, which also runs on CPUs, where it is tested; accelerate shards on GPUs only. Only a call
    of the full module gathers its parameters, not one of a submodule or another method. They are resharded after every
    pass, whatever the launcher says, because the EMA could not be swapped in otherwise.
    """
    if not wants_fsdp(run.accelerator):
        return distributed(module, run, section)
    # fully_shard rejects channels-last parameters; the activations stay channels-last.
    module.to(run.device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    mesh = init_device_mesh(run.device.type, (run.accelerator.num_processes,))
    for layers in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
        for layer in layers:
            if not any(isinstance(part, nn.ModuleList) for part in layer.modules()):
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


def distributed(module: nn.Module, run: Launch, section: TrainSection) -> nn.Module:
    """Move a module to its device, wrap it in DDP if there are several processes, and compile it if configured."""
    module.to(run.device)
    wrapped = module
    if run.accelerator.num_processes > 1:
        for parameter in module.parameters():  # 1x1 kernels are equal in both layouts, but DDP compares strides
            if parameter.dim() == 4 and parameter.shape[2:] == (1, 1):
                parameter.data = parameter.data.as_strided(parameter.shape, (parameter.shape[1], 1, 1, 1))
        # Harmless: the strides of a dimension of size 1 are ambiguous.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        devices = [run.device.index] if run.device.type == "cuda" else None
        # Experts that no process has a picture for get no gradient. To find them, DDP waits for the device each step.
        has_experts = any(isinstance(part, Experts) for part in module.modules())
        wrapped = DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True,
                                          find_unused_parameters=has_experts)  # fmt: skip
    if not section.compile:
        return wrapped
    # The adaptive weight of the adversarial loss goes through a graph twice, so its buffers must not be given away.
    torch._functorch.config.donated_buffer = False
    return torch.compile(wrapped)  # type: ignore[return-value]


def no_sync(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Defer DDP's gradient synchronization to the last micro-batch."""
    inner = getattr(module, "_orig_mod", module)
    if isinstance(inner, DistributedDataParallel) and not last:
        return inner.no_sync()
    return nullcontext()


def in_any_process(run: Launch, numbers: Collection[int], most: int) -> list[int]:
    """Return the union of numbers below `most` over all processes, which all call this, without the device."""
    found = torch.zeros(most, dtype=torch.int64)
    found[list(numbers)] = 1
    torch.distributed.all_reduce(found, group=run.cpu_group)
    return found.nonzero().flatten().tolist()


def local_shard(parameter: nn.Parameter) -> Tensor:
    """Return this process's shard of a parameter, sharing its memory."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach().requires_grad_()
    return parameter


def gather_full(parameter: nn.Parameter, part: Tensor | None = None) -> Tensor:
    """Gather a parameter, or an element-wise state of it whose local shard is `part`, from all processes."""
    part = local_shard(parameter).detach() if part is None else part
    if not isinstance(parameter, DTensor):
        return part
    sharded = DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    return sharded.full_tensor().cpu()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module that is being trained in evaluation mode inside the `with` block, without gradients."""
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()
