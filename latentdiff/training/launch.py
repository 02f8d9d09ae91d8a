"""What a training run needs before its first step: processes, threads, precision, a record of what is run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType

import latentdiff

from ..config import Config
from ..data.order import BatchPlan
from ..device import DTYPES, check_attention, computes_in_bf16
from ..errors import LatentDiffError, check_choice
from ..sections import TrainSection

LIBRARIES = ("torch", "accelerate", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "pillow")
if sys.platform != "win32":
    import fcntl

LOCKS: dict[Path, int] = {}  # files that this process holds open and locked

LONGEST_WAIT = timedelta(hours=12)  # for another process, which may be encoding or writing a checkpoint


@dataclass(frozen=True)
class Launch:
    """The processes of a run, as one of them sees them."""

    config: Config
    accelerator: Accelerator
    folder: Path  # of the run
    precision: str  # fp32, bf16 or fp16
    report: Callable[[str], None]  # a line for the user, from the main process only
    parent: int  # the process that started this one
    cpu_group: torch.distributed.ProcessGroup | None = None  # for flags, where there are several processes

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return bool(self.accelerator.is_main_process)

    def batch_plan(self, section: TrainSection) -> BatchPlan:
        """Which pictures of a step are this process's.

        Raises:
            LatentDiffError: the processes cannot share the batch evenly.
        """
        accelerator = self.accelerator
        return BatchPlan(section.batch_size, accelerator.process_index, accelerator.num_processes,
                         section.micro_batch_size)  # fmt: skip

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of the passes; weights stay float32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])


def launch(config: Config) -> Launch:
    """Join the other processes, set threads and precision, lock the output folder, write run.json.

    Raises:
        LatentDiffError: the folder cannot be written or is in use, or a setting does not work on this device.
    """
    parent = os.getppid()
    accelerator = Accelerator(
        cpu=torch.backends.mps.is_available() and not torch.cuda.is_available(),  # sums in float64 are not for mps
        mixed_precision="no",  # the passes are cast here, in one visible place
        log_with=choose_trackers(config.trackers) or None,
        project_dir=config.output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    check_device(config, accelerator)
    threads = config.threads or max(1, _cores() // _processes_here(accelerator))
    torch.set_num_threads(threads)  # `accelerate launch` sets one thread and would leave the rest idle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or it warns when workers are forked
    precision = choose_precision(config.precision, accelerator.device)
    if accelerator.device.type == "cuda" and precision != "fp32":
        torch.set_float32_matmul_precision("high")

    def report(line: str) -> None:
        if accelerator.is_main_process:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    if (asked := processes_asked()) > accelerator.num_processes:
        report(f"warning: {asked} processes were asked for and {accelerator.num_processes} came up; on a CPU use "
               f"ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes {asked} ...")  # fmt: skip
    several = accelerator.num_processes > 1
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT) if several else None
    run = Launch(config, accelerator, Path(config.output), precision, report, parent, group)
    if accelerator.is_main_process:
        _claim(run.folder)
        _write_record(run, threads)
    accelerator.wait_for_everyone()
    return run


def check_device(config: Config, accelerator: Accelerator) -> None:
    """Refuse now what would be refused after the first stage.

    Raises:
        LatentDiffError: an engine that takes over the optimizer, or `compile` where it does not work.
    """
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise LatentDiffError(f"the launcher asks for {kind.lower()}, which takes over the optimizer; use DDP or FSDP")
    for name, section in (("train_vae", config.train_vae), ("train_latent", config.train_latent)):
        if section.compile and accelerator.device.type == "cpu":
            raise LatentDiffError(
                f"{name}.compile=true: not on a CPU, where torch was found to compile wrong gradients of UNets"
            )
    if config.train_latent.compile and wants_fsdp(accelerator):
        raise LatentDiffError("train_latent.compile=true: not together with FSDP")
    check_attention(config.unet.attention, accelerator.device)


def wants_fsdp(accelerator: Accelerator) -> bool:
    """Whether the launcher asks for FSDP, and there are processes to shard over."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and bool(accelerator.num_processes > 1)


def choose_precision(wanted: str, device: torch.device) -> str:
    """The precision to compute in: what is wanted, or the launcher's, or bf16 where the device computes in it.

    Raises:
        LatentDiffError: fp16 on a CPU.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted == "auto" and launcher in ("bf16", "fp16"):
        wanted = launcher
    if wanted == "auto":
        wanted = "bf16" if computes_in_bf16(device) else "fp32"
    if wanted == "fp16" and device.type == "cpu":
        raise LatentDiffError("precision=fp16: not on a CPU; choose bf16, fp32 or auto")
    return wanted


def choose_trackers(wanted: Sequence[str] | None) -> list[str]:
    """The trackers to use: those that are wanted, or TensorBoard where it is installed.

    Raises:
        LatentDiffError: accelerate does not know a name, or its package is not installed.
    """
    installed = [str(name) for name in get_available_trackers()]
    if wanted is None:
        return [name for name in installed if name == "tensorboard"]
    for name in wanted:
        check_choice("tracker", name, sorted({str(known) for known in LoggerType} - {"all"}))
        if name not in installed:
            raise LatentDiffError(f"trackers: {name} is not installed; pip install {name}")
    return list(wanted)


def processes_asked() -> int:
    """`--num_processes` on the launcher's command line, or 0."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return 0
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            text = value or following
            return int(text) if text.isdigit() else 0
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes_here(accelerator: Accelerator) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def _claim(folder: Path) -> None:
    """Lock the folder as long as this process lives, so that no second run writes into it.

    Raises:
        LatentDiffError: another run has it, or the folder cannot be written.
    """
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
    except OSError:  # a file system without locks
        pass
    LOCKS[path] = lock


def _write_record(run: Launch, threads: int) -> None:
    """Add this launch to run.json."""
    record = {
        "command": sys.argv,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": run.config.model_dump(mode="json"),
        "versions": {"latentdiff": latentdiff.__version__, **{name: version(name) for name in LIBRARIES}},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else platform.machine(),
        "processes": run.accelerator.num_processes,
        "threads": threads,
        "precision": run.precision,
        "git": _git_state(),
    }
    path = run.folder / "run.json"
    try:
        launches = json.loads(path.read_text(encoding="utf-8"))["launches"] if path.is_file() else []
    except (OSError, ValueError, KeyError, TypeError):
        launches = []
    path.write_text(json.dumps({"launches": [*launches, record]}, indent=2) + "\n", encoding="utf-8")


def _git_state() -> str | None:
    """Commit of the checkout that runs, with `-dirty` where files were changed; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
