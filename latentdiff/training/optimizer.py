"""The weight update: AdamW with gradient clipping, the EMA, and skipping of steps that are not finite.

Nothing here waits for the device: whether a step is finite is a scalar on the device, read by the kernels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import LatentDiffError, several
from ..sections import TrainSection
from .ema import EMA
from .parallel import gather_full, local_shard
from .timetable import Timetable

FP16_SCALE, FP16_GROWTH = 2.0**16, 2000  # initial loss scale; finite steps until it doubles


class TrainState:
    """Optimizer and EMA of groups of named parameters, each group with its own learning rate.

    Under FSDP parameters are DTensors. AdamW and the EMA are element-wise, so each process updates its local shards.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Mapping[str, nn.Parameter], float]],
        section: TrainSection,
        timetable: Timetable | None = None,
        *,
        fp16: bool = False,
        tracked: Mapping[str, float] | None = None,
        in_step: bool = True,
    ) -> None:
        """Begin with the weights as they are.

        `tracked` are lengths of further averages, by name. A parameter without a gradient is left as it is: it neither
        decays nor moves on by its momentum, and AdamW does not count the step for it; not `in_step` if there are such.
        """
        self.section, self.timetable = section, timetable or Timetable(section)
        self.parameters = {name: parameter for group, _ in groups for name, parameter in group.items()}
        self.local = {name: local_shard(parameter) for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            [{"params": [self.local[name] for name in group], "base": lr} for group, lr in groups],
            lr=section.learning_rate,
            betas=section.betas,
            weight_decay=section.weight_decay,
            fused=True,
        )
        device = next(iter(self.local.values())).device
        for tensor in self.local.values():  # as AdamW would at its first step; created now so checkpoints can be loaded
            self.optimizer.state[tensor] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(tensor, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False),
            }
        weights = [tensor.detach() for tensor in self.local.values()]
        self.ema = EMA(weights, section.ema_sigma_rel)
        self.averages = {"ema": self.ema}  # which has two names if its length is tracked anyway
        for name, sigma_rel in (tracked or {}).items():
            self.averages[name] = self.ema if sigma_rel == section.ema_sigma_rel else EMA(weights, sigma_rel)
        further = [name for name, average in self.averages.items() if average is not self.ema]
        self.kinds = ("weights", "ema", *further, "exp_avg", "exp_avg_sq")  # of tensors in a checkpoint
        self.fp16, self.in_step = fp16, in_step
        self.loss_scale = torch.full((), FP16_SCALE if fp16 else 1.0, device=device)
        self.since_growth = torch.zeros((), device=device)

    def gradient_norm(self) -> Tensor:
        """Return the norm of the unscaled gradients over all processes, (); not finite if any gradient is not."""
        for name, parameter in self.parameters.items():
            if isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor):
                self.local[name].grad = parameter.grad.to_local()
        gradients = [tensor.grad for tensor in self.local.values() if tensor.grad is not None and tensor.numel()]
        squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
        if any(isinstance(parameter, DTensor) for parameter in self.parameters.values()):
            torch.distributed.all_reduce(squares)
        return squares.sqrt() / self.loss_scale

    @torch.no_grad()
    def update(self, step: int, norm: Tensor, step_is_finite: Tensor) -> None:
        """Take a step, counted from 1, or change nothing at all if `step_is_finite`, () on the device, is 0.

        `norm` comes from `gradient_norm`; gradients are scaled down if it exceeds `max_grad_norm`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * self.timetable.learning_rate(step)
        clip = (norm / self.section.max_grad_norm).clamp(min=1.0)
        optimizer: Any = self.optimizer  # the fused kernels read both attributes, as with torch's GradScaler
        optimizer.grad_scale = torch.where(step_is_finite > 0, clip * self.loss_scale, torch.ones_like(clip))
        optimizer.found_inf = 1.0 - step_is_finite
        self.optimizer.step()
        for average in dict.fromkeys(self.averages.values()):
            average.update(step, step_is_finite)
        if self.fp16:
            self._adjust_scale(step_is_finite)
        for tensor in (*self.parameters.values(), *self.local.values()):
            tensor.grad = None

    def named(self, what: str, *, keep: bool = True) -> dict[str, Tensor]:
        """Return full tensors of `weights`, an average, `exp_avg` or `exp_avg_sq` by parameter name.

        Collective under FSDP: tensors are gathered to the CPU one at a time, and dropped if not `keep`.
        """
        parts = self._parts(what)
        tensors = ((name, gather_full(parameter, parts[name])) for name, parameter in self.parameters.items())
        return {name: tensor for name, tensor in tensors if keep}

    def tensors(self, *, keep: bool = True) -> dict[str, dict[str, Tensor]]:
        """Return everything a checkpoint must hold; collective under FSDP, even for processes that keep nothing."""
        tensors = {what: self.named(what, keep=keep) for what in self.kinds}
        steps = torch.stack([self.optimizer.state[tensor]["step"] for tensor in self.local.values()])
        counted = {"step": steps[0]} if self.in_step else {"steps": steps}
        return {**tensors, "scalars": {**counted, "scale": self.loss_scale, "since_growth": self.since_growth}}

    @torch.no_grad()
    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what `tensors` returned."""
        if missing := set(self.kinds) - state.keys():
            raise LatentDiffError(f"train_latent.ema_snapshots: the checkpoint lacks {several(missing)}, as the run "
                                  "began without; set it to 0, or choose another `output`")  # fmt: skip
        for what in self.kinds:
            parts = self._parts(what)
            for name, parameter in self.parameters.items():
                value = state[what][name].to(parts[name].device)
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements).to_local()
                parts[name].copy_(value)
        steps = state["scalars"]["step" if self.in_step else "steps"].expand(len(self.local))
        for tensor, step in zip(self.local.values(), steps, strict=True):
            self.optimizer.state[tensor]["step"].copy_(step)
        self.loss_scale.copy_(state["scalars"]["scale"])
        self.since_growth.copy_(state["scalars"]["since_growth"])

    def _parts(self, what: str) -> dict[str, Tensor]:
        if what == "weights":
            return {name: tensor.detach() for name, tensor in self.local.items()}
        if what in self.averages:
            return dict(zip(self.local, self.averages[what].tensors, strict=True))
        return {name: self.optimizer.state[tensor][what] for name, tensor in self.local.items()}

    def _adjust_scale(self, step_is_finite: Tensor) -> None:
        """Halve the loss scale after an overflow; double it after many finite steps (arXiv 1710.03740, 3.2)."""
        steps = torch.where(step_is_finite > 0, self.since_growth + 1, torch.zeros_like(self.since_growth))
        self.since_growth.copy_(steps)
        grows = self.since_growth >= FP16_GROWTH
        factor = torch.where(step_is_finite > 0, torch.where(grows, 2.0, 1.0), 0.5)
        self.loss_scale.mul_(factor)
        self.since_growth.mul_((~grows).float())
