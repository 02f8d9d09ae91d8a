"""The cost of a pass without computing it: the real model runs on PyTorch's meta device.

Meta tensors have a shape and a dtype but no memory. FLOPs are counted per operation (2 for a multiply-add), and memory
by following every tensor from allocation to release. `Autocast` corrects two differences from a real device: meta has
no autocast, and it would compute attention without a fused kernel.
"""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

HALF_PRECISION: tuple[Any, ...] = (F.conv2d, F.linear, F.scaled_dot_product_attention)  # under autocast
GROUP_NORM = (torch.ops.aten.native_group_norm, torch.ops.aten.native_group_norm_backward)
NORMS: tuple[Any, ...] = (F.group_norm, F.layer_norm)  # float32 under autocast on GPUs


class Autocast(TorchFunctionMode):
    """torch.autocast for meta tensors, as far as our models need it, with attention as a fused kernel."""

    def __init__(self, dtype: torch.dtype, *, norms_in_float32: bool) -> None:
        # Norms compute in float32, as on GPUs, or in the dtype of their input, as on CPUs.
        super().__init__()
        self.dtype = dtype
        self.norm_dtype = torch.float32 if norms_in_float32 else None
        # Casts cached during the forward pass; None in the backward pass.
        self.copies: dict[tuple[int, bool], Tensor] | None = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in HALF_PRECISION:
            args = tuple(self._cast(value, self.dtype) for value in args)
            kwargs = {name: self._cast(value, self.dtype) for name, value in kwargs.items()}
        elif func in NORMS:
            dtype = self.norm_dtype or args[0].dtype
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:  # a mask costs next to nothing
            attend = torch.ops.aten._scaled_dot_product_efficient_attention
            query, key, value = args[:3]
            return attend(query, key, value, None, compute_log_sumexp=query.requires_grad or key.requires_grad)[0]
        return func(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Run `loss.backward()`, casting what it recomputes; the public method would disable this mode for the call."""
        self.copies = None
        start = (torch.ones_like(loss),)
        _engine_run_backward((loss,), start, False, False, (), allow_unreachable=True, accumulate_grad=True)
        self.copies = {}

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if self.copies is None or not isinstance(value, nn.Parameter):
            return value.to(dtype)
        key = id(value), torch.is_grad_enabled()  # a copy made without has no gradient
        if key not in self.copies:
            self.copies[key] = value.to(dtype)
        return self.copies[key]


def group_norm_on_meta(op: Any, args: Any) -> Any:
    """Return the outputs of a GroupNorm or its backward, which PyTorch decomposes at a quarter of a plan's time."""
    if op is GROUP_NORM[0]:
        x, n, groups = args[0], args[3], args[6]
        return torch.empty_like(x), x.new_empty(n, groups), x.new_empty(n, groups)
    x, channels, output_mask = args[1], args[6], args[9]
    gradients = torch.empty_like(x), x.new_empty(channels), x.new_empty(channels)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, output_mask, strict=True))


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs and live bytes within its context; unlike FlopCounterMode, it keeps no recomputed tensors alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0  # of matmuls, convolutions and attention: all but a few percent of the work
        self.live = self.peak = 0  # bytes, now and at most
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors([args, kwargs])}
        if (op := func.overloadpacket) in GROUP_NORM and args[0].is_meta:
            result = group_norm_on_meta(op, args)
        else:
            result = func(*args, **kwargs)
        if (formula := flop_registry.get(op)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in inputs:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.live -= size


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []
