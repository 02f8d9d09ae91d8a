"""Setup of a training run before its first step: processes, threads, precision, a record of the launch."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from ..config import Config
from ..data.order import BatchPlan
from ..device import DTYPES, check_attention, computes_in_bf16
from ..errors import LatentDiffError, check_choice
from ..sections import TrainSection
from ..sections.values import duration
from .record import begin_record, end_record
from .rendezvous import TIMEOUT, process_group_settings
from .signals import LAUNCHER_VARIABLES

if sys.platform != "win32":
    import fcntl

LOCKS: dict[Path, int] = {}  # lock files that this process holds open


@dataclass
class Clock:
    """Seconds that a run has taken, over all its launches; the time between launches does not count."""

    started: float = field(default_factory=time.monotonic)  # when this launch began
    before: float = 0.0  # seconds of earlier launches, up to the state that this one goes on from

    def elapsed(self) -> float:
        """Return the seconds so far."""
        return self.before + time.monotonic() - self.started

    def go_on_from(self, seconds: float) -> None:
        """Take over the seconds that earlier launches had taken when they saved what this one goes on from."""
        self.before = seconds


def process_start() -> float:
    """Return when this process, or the launcher that started it, began, on the monotonic clock."""
    process, names = psutil.Process(), ("accelerate", "torchrun", "torch.distributed")
    launched = any(variable in os.environ for variable in LAUNCHER_VARIABLES)  # also set by hand, in a shell
    if launched and any(name in word for word in _parent_command() for name in names):
        process = process.parent() or process
    return time.monotonic() - (time.time() - process.create_time())


@dataclass(frozen=True)
class Launch:
    """A launched run, as seen by one of its processes."""

    config: Config
    accelerator: Accelerator
    folder: Path  # output of the run
    precision: str  # fp32, bf16 or fp16
    report: Callable[[str], None]  # prints a line for the user, from the main process only
    parent: int  # PID of the process that started this one
    cpu_group: torch.distributed.ProcessGroup | None = None  # for stop flags; None with a single process
    clock: Clock = field(default_factory=Clock)
    said: set[str] = field(default_factory=set)  # by `say_once`
    trained: set[str] = field(default_factory=set)  # names of the stages that it began or went on with
    pictures: dict[str, Any] = field(default_factory=dict)  # for data.json: how many there are, and what is left out

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def budget(self) -> float | None:
        """The budget in seconds."""
        return None if self.config.budget is None else duration(self.config.budget)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return bool(self.accelerator.is_main_process)

    def say_once(self, line: str, about: str | None = None) -> None:
        """Report a line unless it, or another one `about` the same, was reported before in this launch."""
        if (key := about or line) not in self.said:
            self.said.add(key)
            self.report(line)

    def batch_plan(self, section: TrainSection) -> BatchPlan:
        """Return this process's share of every batch; raise unless it divides evenly among the processes."""
        accelerator = self.accelerator
        return BatchPlan(section.batch_size, accelerator.process_index, accelerator.num_processes,
                         section.micro_batch_size)  # fmt: skip

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context in which forward passes use `precision`; weights stay float32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])


def launch(config: Config, began: float | None = None, *, record: bool = True) -> Launch:
    """Join the process group, set threads and precision, lock the output folder and, with `record`, write run.json.

    A budget counts from `began`, on the monotonic clock; None: from now.
    """
    clock = Clock() if began is None else Clock(began)
    parent = os.getppid()
    accelerator = Accelerator(
        cpu=torch.backends.mps.is_available() and not torch.cuda.is_available(),  # MPS lacks float64, used in sums
        mixed_precision="no",  # casting is left to `Launch.autocast`, in one visible place
        log_with=choose_trackers(config.trackers) or None,
        project_dir=config.output,
        kwargs_handlers=[process_group_settings()],
    )
    check_device(config, accelerator)
    threads = config.threads or max(1, _num_cores() // _num_local_processes(accelerator))
    torch.set_num_threads(threads)  # `accelerate launch` sets one thread, leaving the other cores idle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # avoids a warning when workers are forked
    precision = choose_precision(config.precision, accelerator.device)
    if accelerator.device.type == "cuda" and precision != "fp32":
        torch.set_float32_matmul_precision("high")

    def report(line: str) -> None:
        if accelerator.is_main_process:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    if (requested := requested_processes()) > accelerator.num_processes:
        report(f"warning: {requested} processes were requested but {accelerator.num_processes} started; on a CPU use "
               f"ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes {requested} ...")  # fmt: skip
    several = accelerator.num_processes > 1
    group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if several else None
    run = Launch(config, accelerator, Path(config.output), precision, report, parent, group, clock)
    if accelerator.is_main_process:
        _lock_folder(run.folder)
        device = torch.cuda.get_device_name() if run.device.type == "cuda" else platform.machine()
        facts = {"config": config.model_dump(mode="json"), "device": device, "threads": threads,
                 "processes": accelerator.num_processes, "precision": precision}  # fmt: skip
        if record:
            begin_record(run.folder, facts)
    accelerator.wait_for_everyone()
    return run


@contextmanager
def launched(
    config: Config, run: Launch | None, began: float | None = None, *, record: bool = True
) -> Iterator[Launch]:
    """Give the run, or launch one; at its end, record how it ended (with `record`) and unlock its folder for others."""
    if run is not None:
        yield run
        return
    run = launch(config, began, record=record)
    error: BaseException | None = None
    try:
        yield run
    except BaseException as raised:
        error = raised
        raise
    finally:
        if run.is_main and record:
            end_record(
                run.folder, error, run.clock.elapsed(), run.report, report=run.config.report, trained=run.trained
            )
        _unlock_folder(run.folder)


def check_device(config: Config, accelerator: Accelerator) -> None:
    """Raise unless the device and the launcher support the settings of both stages."""
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise LatentDiffError(f"the launcher requests {kind.lower()}, which takes over the optimizer; use DDP or FSDP")
    for name, section in (("train_vae", config.train_vae), ("train_latent", config.train_latent)):
        if section.compile and accelerator.device.type == "cpu":
            raise LatentDiffError(
                f"{name}.compile=true: not supported on a CPU, where torch was seen to compile wrong gradients"
            )
    if config.train_latent.compile and wants_fsdp(accelerator):
        raise LatentDiffError("train_latent.compile=true: not supported with FSDP")
    check_attention(config.unet.attention, accelerator.device, "unet.attention")


def wants_fsdp(accelerator: Accelerator) -> bool:
    """Whether the launcher requests FSDP and there are several processes to shard over."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and bool(accelerator.num_processes > 1)


def choose_precision(wanted: str, device: torch.device) -> str:
    """Resolve `auto` to the launcher's precision, or to bf16 if the device supports it; raise for fp16 on a CPU."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted == "auto" and launcher in ("bf16", "fp16"):
        wanted = launcher
    if wanted == "auto":
        wanted = "bf16" if computes_in_bf16(device) else "fp32"
    if wanted == "fp16" and device.type == "cpu":
        raise LatentDiffError("precision=fp16: not supported on a CPU; choose bf16, fp32 or auto")
    return wanted


def choose_trackers(wanted: Sequence[str] | None) -> list[str]:
    """Return the wanted trackers, by default TensorBoard if installed; raise if one is unknown or not installed."""
    installed = [str(name) for name in get_available_trackers()]
    if wanted is None:
        return [name for name in installed if name == "tensorboard"]
    for name in wanted:
        check_choice("tracker", name, sorted({str(known) for known in LoggerType} - {"all"}))
        if name not in installed:
            raise LatentDiffError(f"trackers: {name} is not installed; pip install {name}")
    return list(wanted)


def requested_processes() -> int:
    """Return `--num_processes` from the launcher's command line, or 0."""
    words = _parent_command()
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            text = value or following
            return int(text) if text.isdigit() else 0
    return 0


def _parent_command() -> list[str]:
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _num_local_processes(accelerator: Accelerator) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep runs from writing into an output folder; raise LatentDiffError if one does."""
    _lock_folder(folder)
    try:
        yield
    finally:
        _unlock_folder(folder)


def _lock_folder(folder: Path) -> None:
    """Lock the folder until it is unlocked or this process ends, so that no second run writes into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = (folder / ".lock").resolve()
        if sys.platform == "win32" or path in LOCKS:
            return
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise LatentDiffError(f"output={folder}: cannot be written ({error})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise LatentDiffError(f"output={folder}: another run is writing there") from None
    except OSError:  # the file system does not support locks
        pass
    LOCKS[path] = lock


def _unlock_folder(folder: Path) -> None:
    if (lock := LOCKS.pop((folder / ".lock").resolve(), None)) is not None:
        os.close(lock)
