"""A plan, as numbers and as text."""

from dataclasses import dataclass

from .devices import GIB, Device


@dataclass(frozen=True)
class Memory:
    """Bytes per device, exact except for the activations."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0  # at their peak, with half-precision copies and temporary tensors

    @property
    def total(self) -> int:
        """Estimated peak, reached in the passes or in the update of the average, which takes one more copy."""
        return sum((self.weights, self.gradients, self.optimizer, self.average, max(self.activations, self.average)))


@dataclass(frozen=True)
class Stage:
    """The plan of one stage, with FLOPs per picture; a multiply-add counts as two."""

    name: str
    parameters: dict[str, int]
    trained: int  # parameters
    batch: int  # pictures per pass and device
    forward_flops: int
    step_flops: int  # forward and backward with recomputation; forward only if the stage does not train
    pictures: int  # in the whole stage
    total_flops: int
    precision: str
    memory: Memory
    fits: bool
    largest_batch: int  # the largest power of two estimated to fit; 0 if none
    seconds: float  # estimated
    disk: dict[str, int]  # bytes by purpose
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The plan of all stages on a number of devices."""

    device: Device
    num_devices: int
    mfu: float
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every stage is estimated to fit in memory."""
        return all(stage.fits for stage in self.stages)

    def lines(self) -> list[str]:
        """Format the plan as text."""
        device = self.device
        origin = "measured with matmuls" if device.name == "cpu" else "vendor figures without sparsity"
        speed = f"{device.half:.3g} TFLOP/s in half precision, {device.single:.3g} in float32 ({origin})"
        head = [
            f"{self.num_devices} x {device.name}: {device.memory:.1f} GiB each, {speed}",
            "parameters and FLOPs are counted; memory and time (of passes only) are estimates;",
            f"the device is assumed to reach {self.mfu:.0%} of its peak (--mfu); a single small picture reaches less",
        ]
        end = f"estimate: the run {'fits' if self.fits else 'does not fit'} on {self.num_devices} x {device.name}"
        return [*head, *(line for stage in self.stages for line in ["", *_stage_lines(stage)]),
                "", *(f"note: {note}" for note in self.notes), end]  # fmt: skip


def _stage_lines(stage: Stage) -> list[str]:
    memory, sizes = stage.memory, ", ".join(f"{name} {number:,}" for name, number in stage.parameters.items() if number)
    rows = [("parameters", sizes + (f"; {stage.trained:,} trainable" if stage.trained else ""))]
    flops = f"{stage.forward_flops / 1e9:,.1f} GFLOP forward"
    if stage.trained:
        flops += f", {stage.step_flops / 1e9:,.1f} forward and backward ({stage.step_flops / stage.forward_flops:.2f}x)"
    rows.append(("one picture", f"{flops}, in {stage.precision}"))
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
             "average": memory.average, "activations": memory.activations}  # fmt: skip
    breakdown = " + ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    rows.append(("memory", f"estimate {gib(memory.total)} per device at {stage.batch} per pass: {breakdown}"))
    verdict = "fits (estimate)" if stage.fits else "DOES NOT FIT (estimate)"
    if stage.trained:
        verdict += f"; largest power of two per pass that fits: {stage.largest_batch or 'none'}"
    rows.append(("verdict", verdict))
    rows += [("disk", f"{what}: {gib(size)}") for what, size in stage.disk.items()]
    rows.append(("time", f"estimate {_duration(stage.seconds)} for {stage.total_flops / 1e12:,.3g} TFLOP"))
    rows += [("advice", text) for text in stage.advice]
    return [stage.name, *(f"  {what:<12}{text}" for what, text in rows)]


def gib(size: float) -> str:
    """Format a number of bytes as GiB or MiB."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.2g} seconds"
