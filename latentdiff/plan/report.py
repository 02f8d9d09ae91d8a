"""A plan, as numbers and as text."""

from dataclasses import dataclass

from ..sections.values import duration
from .devices import GIB, Device

MEMORIZED = 100  # passes; emoji-64 had 108


@dataclass(frozen=True)
class Memory:
    """Bytes per device, exact except for the activations."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0  # all of them, with `ema_snapshots`
    activations: int = 0  # at their peak, with half-precision copies and temporary tensors

    @property
    def total(self) -> int:
        """Estimated peak."""
        return self.states + max(self.activations, self.update)

    @property
    def states(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def update(self) -> int:
        """What the update of an average takes, as large as the gradients: its difference from the weights."""
        return self.gradients


@dataclass(frozen=True)
class Purchase:
    """What a stage's part of the budget buys, an estimate."""

    budget: str  # the whole, as given
    share: float  # of the budget
    seconds: float  # the same
    end: float  # of the stage, in seconds after the launch
    steps: int
    is_bounded: bool  # by max_steps
    fewest: int  # steps without which training refuses to begin
    batch_size: int
    set_size: int  # training pictures
    warmup_steps: int
    discriminator_start: int | None  # its first step, if it has one
    decay_start: int  # the first step with a lower learning rate
    enough: str | None  # a budget for the fewest steps, if this one is too short for them

    @property
    def passes(self) -> float:
        """How often each training picture is seen."""
        return self.steps * self.batch_size / self.set_size


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
    checkpoint: int = 0  # bytes: weights, averages and two moments in float32
    early_flops: int = 0  # like step_flops, as long as the discriminator has not started
    purchase: Purchase | None = None  # with a budget, which also decides on `pictures` and what follows from it


@dataclass(frozen=True)
class Plan:
    """The plan of all stages on a number of devices."""

    device: Device
    num_devices: int
    mfu: float
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]
    seconds: float  # of the run, estimated; without a budget, of passes only

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
                "", *(f"note: {note}" for note in self.notes), self._total(), end]  # fmt: skip

    def _total(self) -> str:
        purchases = [stage.purchase for stage in self.stages if stage.purchase]
        if not purchases:
            return f"estimate: the run takes {_duration(self.seconds)} (passes only)"
        short = [purchase.enough for purchase in purchases if purchase.enough]
        if short:
            return f"estimate: budget={purchases[0].budget} is too short; {max(short, key=duration)} would do"
        return f"estimate: the run takes {_duration(self.seconds)} of budget={purchases[0].budget}"


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
    rows += _purchase_rows(stage.purchase, stage.seconds) if stage.purchase else []
    rows.append(("time", f"estimate {_duration(stage.seconds)} for {stage.total_flops / 1e12:,.3g} TFLOP"))
    rows += [("advice", text) for text in stage.advice]
    if stage.purchase and stage.name == "train_latent" and stage.purchase.passes > MEMORIZED:
        rows.append(("note", f"beyond some {MEMORIZED} passes, a model memorizes rather than generalizes: emoji-64 did "
                             "so in 108 over its 2,496 pictures; its held-out loss was lowest after 36"))  # fmt: skip
    return [stage.name, *(f"  {what:<12}{text}" for what, text in rows)]


def _purchase_rows(bought: Purchase, seconds: float) -> list[tuple[str, str]]:
    part = f"estimate {_duration(bought.seconds)}, {bought.share:.0%} of {bought.budget}"
    if bought.enough:
        few = f"{part}, are too short: {bought.steps} steps fit, at least {bought.fewest} are needed"
        return [("budget", f"{few}; {bought.enough} would do")]
    number = f"{bought.steps:,}{' (max_steps)' if bought.is_bounded else ''}"
    pace = bought.steps / seconds
    speed = f"{pace:,.0f}" if pace >= 100 else f"{pace:.3g}"
    pictures = f"{bought.steps * bought.batch_size:,} pictures, {bought.passes:,.1f} passes over {bought.set_size:,}"
    changes = [f"warm-up to step {bought.warmup_steps:,}"] if bought.warmup_steps else []
    if bought.discriminator_start:
        changes.append(f"a discriminator from step {bought.discriminator_start:,} on")
    changes.append(f"a falling learning rate from step {bought.decay_start:,} on")
    return [
        ("budget", part),
        ("steps", f"estimate {number} of {bought.batch_size}, {speed} per second: {pictures}"),
        ("schedule", f"estimate: {', '.join(changes)}"),
    ]


def gib(size: float) -> str:
    """Format a number of bytes as GiB or MiB."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 100 else f"{seconds:.0f} seconds"
