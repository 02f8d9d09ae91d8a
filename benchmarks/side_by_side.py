"""Our models against diffusers' with the same weights: first equality, then time in alternation, then peak memory.

There are three sides: `diffusers` as documented (NCHW, eager), diffusers `tuned` (channels-last; on CUDA also fused
q, k, v) and `ours`. A task is what is timed, such as one forward pass. TF32 is always off, which is PyTorch's default
for matrix products but not for convolutions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stopwatch import peak_in_new_process, peak_on_cuda, ratio_of_medians, time_in_turns
from torch import Tensor, nn

SIDES = ("diffusers", "tuned", "ours")
AUTOCAST = "autocast"  # float32 weights and bfloat16 arithmetic
TRAINING = "forward + backward"  # the task with gradients: loss = output.square().mean()
OUTPUT_LIMIT = 1e-5  # relative error in float32
GRADIENT_LIMIT = 1e-4  # for the gradient of the first layer, which passes through every layer twice
BFLOAT16_FACTOR = 1.5  # our bfloat16 error over diffusers' own, both against float32
NOTES = """side / ours: ratio of the median times with its bootstrap 90 % interval; above 1, ours is faster.
peak: the most that one call holds beyond what was held before it (weights, inputs). On a CPU: resident memory (VmHWM)
during the second call of a process that does nothing else; on CUDA: memory allocated by PyTorch."""

Inputs = dict[str, Tensor]
Step = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    size: str
    batch: int
    device: str
    dtypes: list[str]
    rounds: int
    threads: int
    compile: str | None
    json: Path | None


@dataclasses.dataclass(frozen=True)
class Contest:
    """One kind of model on both sides; can be sent to a new process, as nothing here is a closure or a tensor."""

    ours: Any  # class with from_pretrained(folder, device=, dtype=)
    theirs: Any  # class of diffusers with from_pretrained(folder, torch_dtype=)
    tasks: tuple[str, ...]
    build: Callable[[str], Any]  # size -> diffusers' model, with the same random weights every time
    inputs: Callable[[str, int], Inputs]  # size, batch -> float32 and int64 tensors, the same every time
    forward: Callable[[str, str, Any, Inputs], Step]  # side, task, model, inputs -> one forward pass

    def open(self, side: str, folder: Path, dtype: str, device: str) -> Any:
        """Open the model of one side with the weights in the folder."""
        if side == "ours":
            return self.ours.from_pretrained(folder, device=device, dtype=weights(dtype))
        model = self.theirs.from_pretrained(folder, torch_dtype=weights(dtype)).to(device)
        if side == "tuned":
            model.to(memory_format=torch.channels_last)
            if device == "cuda":
                model.fuse_qkv_projections()
        return model

    def step(self, side: str, task: str, model: nn.Module, settings: Settings, dtype: str) -> Step:
        """Return what is timed: a forward pass, or forward and backward, which returns the first layer's gradient."""
        parameter = next(model.parameters())  # of the first convolution: its gradient passes through every layer
        inputs = self.inputs(settings.size, settings.batch)
        for name, tensor in inputs.items():
            kind = parameter.dtype if tensor.is_floating_point() else tensor.dtype
            layout = torch.channels_last if side == "tuned" and tensor.dim() == 4 else torch.preserve_format
            inputs[name] = tensor.to(parameter.device, kind, memory_format=layout)
        model.train(task == TRAINING)
        forward = self.forward(side, task, model, inputs)
        if dtype == AUTOCAST:
            forward = torch.autocast(parameter.device.type, torch.bfloat16)(forward)
        if settings.compile:
            forward = torch.compile(forward, mode=settings.compile, fullgraph=True)

        def forward_and_backward() -> Tensor:
            forward().float().square().mean().backward()
            gradient = parameter.grad
            model.zero_grad(set_to_none=True)
            assert gradient is not None
            return gradient

        return forward_and_backward if task == TRAINING else torch.no_grad()(forward)


@dataclasses.dataclass(frozen=True)
class Check:
    """Comparison of an output with that of diffusers in float32."""

    dtype: str
    task: str
    side: str
    error: float  # norm of the difference over the norm of the reference
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; False if it is NaN."""
        return self.error <= self.limit


@dataclasses.dataclass(frozen=True)
class Row:
    """Measurements of one side on one task."""

    dtype: str
    task: str
    side: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float  # this side's median over ours: above 1, ours is faster
    ratio_interval: tuple[float, float]
    peak_mib: float | None
    seconds: list[float]  # every timed call


def weights(dtype: str) -> torch.dtype:
    """Return the dtype of the weights."""
    kind: torch.dtype = torch.float32 if dtype == AUTOCAST else getattr(torch, dtype)
    return kind


def outputs(contest: Contest, side: str, folder: Path, dtype: str, settings: Settings) -> Inputs:
    """Return the output of every task, in float64 on the CPU."""
    model = contest.open(side, folder, dtype, settings.device)
    return {task: contest.step(side, task, model, settings, dtype)().double().cpu() for task in contest.tasks}


def check_equality(contest: Contest, folder: Path, settings: Settings) -> list[Check]:
    """Compare every task of `tuned` and `ours`, in float32 and the requested dtypes, with diffusers in float32."""
    eager = dataclasses.replace(settings, compile=None)
    reference = outputs(contest, "diffusers", folder, "float32", eager)

    def errors(values: Inputs) -> dict[str, float]:
        return {task: float((values[task] - exact).norm() / exact.norm()) for task, exact in reference.items()}

    checks = []
    for dtype in dict.fromkeys(["float32", *settings.dtypes]):
        limits = {task: GRADIENT_LIMIT if task == TRAINING else OUTPUT_LIMIT for task in contest.tasks}
        if dtype != "float32":
            theirs = errors(outputs(contest, "diffusers", folder, dtype, eager))
            limits = {task: BFLOAT16_FACTOR * error for task, error in theirs.items()}
        for side in ("tuned", "ours"):
            found = errors(outputs(contest, side, folder, dtype, settings))
            checks += [Check(dtype, task, side, found[task], limits[task]) for task in contest.tasks]
    return checks


def measure(contest: Contest, folder: Path, settings: Settings) -> list[Row]:
    """Measure time and memory of all sides on all tasks."""
    rows = []
    multiprocessing.set_forkserver_preload([contest.theirs.__module__])  # importing it takes most of a process's time
    for dtype in settings.dtypes:
        models = {side: contest.open(side, folder, dtype, settings.device) for side in SIDES}
        for task in contest.tasks:
            steps = {side: contest.step(side, task, models[side], settings, dtype) for side in SIDES}
            seconds = time_in_turns(steps, settings.rounds, settings.device)
            for side in SIDES:
                if settings.device == "cuda":
                    peak: float | None = peak_on_cuda(steps[side])
                else:
                    peak = peak_in_new_process(prepare, contest, side, task, folder, dtype, settings)
                p10, median, p90 = (1e3 * float(q) for q in np.quantile(seconds[side], [0.1, 0.5, 0.9]))
                ratio, low, high = ratio_of_medians(seconds[side], seconds["ours"])
                rows.append(Row(dtype, task, side, median, p10, p90, ratio, (low, high), peak, seconds[side]))
    return rows


def prepare(contest: Contest, side: str, task: str, folder: Path, dtype: str, settings: Settings) -> Step:
    """Prepare a step in a separate process."""
    torch.set_num_threads(settings.threads)
    return contest.step(side, task, contest.open(side, folder, dtype, settings.device), settings, dtype)


def environment(settings: Settings) -> dict[str, str]:
    """Return what is needed to repeat the run."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else cpu,
        "threads": str(settings.threads),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def table(rows: list[Row]) -> Table:
    """Return a table with one line per side, and a rule after every task."""
    result = Table("dtype", "task", "side", "median ms", "p10 – p90", "side / ours", "90 %", "peak MiB")
    for row in rows:
        low, high = row.ratio_interval
        is_ours = row.side == "ours"
        result.add_row(
            row.dtype,
            row.task,
            row.side,
            f"{row.median_ms:.1f}",
            f"{row.p10_ms:.1f} – {row.p90_ms:.1f}",
            "" if is_ours else f"{row.ratio:.3f}",
            "" if is_ours else f"{low:.3f} – {high:.3f}",
            "?" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            end_section=is_ours,
        )
    return result


def parse(description: str, sizes: tuple[str, ...], batch: int) -> Settings:
    """Parse the command line; the defaults take less than four minutes on two cores."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=sizes, default=sizes[0])
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", AUTOCAST),
                        default=["float32", "bfloat16"], help="autocast: float32 weights, as in training")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=10, help="timed calls per side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    modes = ("default", "reduce-overhead", "max-autotune")
    parser.add_argument("--compile", choices=modes, help="use torch.compile for all three sides, in this mode")
    parser.add_argument("--json", type=Path, help="write all results, including every timed call, to this file")
    return Settings(**vars(parser.parse_args()))


def check_table(checks: list[Check]) -> Table:
    """Return a table with one line per comparison."""
    result = Table("dtype", "task", "side", "relative error", "limit", "")
    for check in checks:
        verdict = "equal" if check.passed else "DIFFERENT"
        result.add_row(check.dtype, check.task, check.side, f"{check.error:.1e}", f"{check.limit:.1e}", verdict)
    return result


def run(contest: Contest, settings: Settings) -> int:
    """Check, measure and print; returns 1 if the sides do not agree."""
    torch.set_num_threads(settings.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    diffusers.utils.logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    setup = environment(settings)
    console.print("\n".join(f"{name:10} {value}" for name, value in setup.items()))
    with tempfile.TemporaryDirectory() as folder:
        contest.build(settings.size).save_pretrained(folder)
        checks = check_equality(contest, Path(folder), settings)
        console.print(check_table(checks))
        if not all(check.passed for check in checks):
            console.print("The outputs of the sides differ; nothing was timed.")
            return 1
        torch.compiler.reset()  # otherwise the models of the checks would count as recompilations
        rows = measure(contest, Path(folder), settings)
    console.print(table(rows))
    console.print(NOTES)
    if settings.json is not None:
        results = {"environment": setup, "settings": dataclasses.asdict(settings), "checks": checks, "rows": rows}
        settings.json.write_text(json.dumps(results, default=plain, indent=1) + "\n", encoding="utf-8")
    return 0


def plain(value: Any) -> Any:
    """Convert dataclasses and paths for JSON."""
    return dataclasses.asdict(value) if isinstance(value, Check | Row) else str(value)
