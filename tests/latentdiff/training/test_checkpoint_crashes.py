"""Crashes, power failures and full disks, at every call that changes the disk and at random moments."""

import errno
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentdiff.errors import LatentDiffError
from latentdiff.training.checkpoint import newest_checkpoint, save_checkpoint, verify


class Dead(BaseException):
    """The process has died: nothing it would have done afterwards happens."""


class Disk:
    """Counts all calls that change the disk, and can make one of them fail or the process die at it.

    A dead process does nothing more: every later call raises Dead, too. A write that fails or is interrupted leaves
    half of its bytes behind.
    """

    CALLS = ("mkdir", "rename", "fsync", "unlink", "rmdir")

    def __init__(self) -> None:
        self.real = {name: getattr(os, name) for name in self.CALLS}
        self.log: list[str] = []
        self.unsynced: set[Path] = set()
        self.fail_at, self.error, self.dead = 0, None, False  # 1 is the first call
        self.before_each: Callable[[], None] = lambda: None

    def arm(self, fail_at: int, error: BaseException | None) -> None:
        self.log, self.fail_at, self.error, self.dead = [], fail_at, error, False

    def count(self, name: str) -> None:
        if self.dead:
            raise Dead
        self.before_each()
        self.log.append(name)
        if len(self.log) == self.fail_at and self.error is not None:
            self.dead = isinstance(self.error, Dead)
            raise self.error

    def call(self, name: str) -> Callable[..., object]:
        def counted(*args: object, **options: object) -> object:
            self.count(name)
            if name == "fsync":
                path = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
                self.unsynced.discard(path)
                self.log[-1] = f"fsync {path.name}"
                return None  # no real power is cut, so there is nothing to wait for
            if name == "rename":
                self.log[-1] = f"rename {Path(str(args[1])).name}"
            return self.real[name](*args, **options)

        return counted

    def file(self, path: Path, mode: str = "r", *args: object, **options: object) -> io.IOBase:
        if not set(mode) & set("wxa+"):
            return open(path, mode, *args, **options)
        self.count("open")
        self.unsynced.add(path)
        file = open(path, mode, *args, **options)  # noqa: SIM115 (Written closes it)
        write = file.write

        def counted(chunk: bytes | memoryview) -> int:
            try:
                self.count("write")
            except BaseException:
                write(bytes(chunk)[: len(chunk) // 2])
                raise
            return write(chunk)

        return Written(file, counted)


class Written:
    """An open file with a replaced `write`."""

    def __init__(self, file: io.IOBase, write: Callable[..., int]) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


@contextmanager
def counted_disk() -> Iterator[Disk]:
    disk = Disk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *args, **options: disk.file(path, *args, **options))
        for name in Disk.CALLS:
            patch.setattr(os, name, disk.call(name))
        yield disk


@pytest.fixture
def disk():
    with counted_disk() as disk:
        yield disk


def save(folder: Path, step: int, keep: int = 1, mark: float = 0.5) -> None:
    """A small checkpoint in which every number is the step plus a mark."""
    value = torch.full((3, 5), step + mark)
    save_checkpoint(
        folder, step, {"unet": {"a": value, "b": value[0]}, "ema": {"a": value}}, {"is": step + mark}, keep=keep
    )


def check_whole(folder: Path, allowed: set[float]) -> None:
    """There is an intact and consistent checkpoint, and it is one of the allowed ones."""
    found = newest_checkpoint(folder, lambda line: None)
    assert found is not None
    assert found.metadata["is"] in allowed
    for name in ("unet", "ema"):
        for tensor in found.tensors(name).values():
            assert bool((tensor == found.metadata["is"]).all())


def before_save(folder: Path, scene: str) -> int:
    """Set up a folder and return the step to save next."""
    save(folder, 1)
    if scene == "next step":
        return 2
    if scene != "same step":  # as a crash leaves it
        shutil.copytree(folder / "step-00000001", folder / "step-00000001.old")
        shutil.copytree(folder / "step-00000001", folder / f".trash-step-00000000-{'0' * 32}")
    if scene == "after damage":
        (folder / "step-00000001" / "ema.safetensors").unlink()
    return 1


SCENES = ("next step", "same step", "after a crash", "after damage")


def calls_of(scene: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, counted_disk() as disk:
        step = before_save(Path(folder), scene)
        disk.arm(0, None)
        save(Path(folder), step, mark=0.25)
        return disk.log


@pytest.mark.parametrize("power", ["kept", "cut"])
@pytest.mark.parametrize("scene", SCENES)
def test_death_at_any_call_leaves_a_whole_checkpoint(tmp_path, disk, scene, power):
    """After a power cut, files that were not synced are empty."""
    for call in range(1, len(calls_of(scene)) + 1):
        folder = tmp_path / str(call)
        step = before_save(folder, scene)
        disk.arm(call, Dead())
        with pytest.raises(Dead):
            save(folder, step, mark=0.25)
        disk.arm(0, None)
        if power == "cut":
            for path in disk.unsynced:
                if path.exists():
                    os.truncate(path, 0)
        disk.unsynced.clear()
        check_whole(folder, {1.5, step + 0.25})
        save(folder, step, mark=0.75)  # the next run resumes and cleans up
        check_whole(folder, {step + 0.75})
        assert os.listdir(folder) == [f"step-{step:08d}"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("scene", SCENES)
def test_an_error_at_any_call_is_told_and_changes_nothing(tmp_path, disk, scene, code):
    calls = calls_of(scene)
    placed = max(place for place, call in enumerate(calls, 1) if call.startswith("rename step-"))
    told = []
    for call in range(1, len(calls) + 1):
        folder = tmp_path / str(call)
        step = before_save(folder, scene)
        disk.arm(call, OSError(code, os.strerror(code)))
        is_saved = True
        try:
            save(folder, step, mark=0.25)
        except LatentDiffError as error:
            told.append(str(error).replace(f"{folder}: the checkpoint of step {step} cannot be written ", ""))
            is_saved = call > placed
        else:  # the folder exists already; what should be deleted may stay until the next save
            assert call == 1 or calls[call - 1] in ("unlink", "rmdir")
        check_whole(folder, {step + 0.25} if is_saved else {1.5})
        assert not [name for name in os.listdir(folder) if name.startswith(".partial")]
    assert set(told) == {f"({os.strerror(code)})"}


def test_what_is_written_reaches_the_disk_in_order(tmp_path, disk):
    before_save(tmp_path, "next step")
    disk.arm(0, None)
    save(tmp_path, 2)
    folder_synced = disk.log.index(f"fsync {tmp_path.name}")
    staging_synced = next(at for at, call in enumerate(disk.log) if call.startswith("fsync .partial-"))
    renamed = disk.log.index("rename step-00000002")
    trashed = next(at for at, call in enumerate(disk.log) if call.startswith("rename .trash-"))
    assert max(at for at, call in enumerate(disk.log) if call == "write") < staging_synced < renamed
    assert {f"fsync {name}" for name in os.listdir(tmp_path / "step-00000002")} <= set(disk.log[:staging_synced])
    assert renamed < folder_synced < trashed


# Any order of events

EVENT = st.one_of(
    st.tuples(st.just("save"), st.integers(0, 2)),  # steps ahead
    st.tuples(st.just("crash"), st.integers(1, 60)),  # at this call of the next save
    st.tuples(st.just("crash again"), st.integers(1, 60)),  # likewise, saving the newest step again
    st.tuples(st.just("fail"), st.integers(1, 60)),
    st.tuples(st.just("corrupt"), st.integers(0, 1000)),
    st.tuples(st.just("stray"), st.integers(0, 3)),
)


class History:
    """A checkpoint folder and its invariants."""

    def __init__(self, folder: Path, keep: int, disk: Disk) -> None:
        self.folder, self.keep, self.disk = folder, keep, disk
        self.step, self.crashes, self.had, self.strays = 1, 0, False, set()

    def whole_steps(self) -> set[str]:
        paths = [path for path in self.folder.iterdir() if path.name.startswith("step-0")]
        return {path.name.removesuffix(".old") for path in paths if verify(path) is None}

    def check(self) -> None:
        """Hold at every moment."""
        whole = self.whole_steps()
        assert whole or not self.had
        assert len(whole) <= self.keep + 1 + self.crashes

    def happen(self, kind: str, number: int) -> None:
        self.had = bool(self.whole_steps())
        if kind == "save":
            self.step += number
            self.save(0, None)
            assert f"step-{self.step:08d}" in self.whole_steps()
            assert len(self.whole_steps()) <= self.keep
            self.crashes = 0
        elif kind in ("crash", "crash again"):
            self.step += kind == "crash"
            self.crashes += 1
            self.save(number, Dead())
        elif kind == "fail":
            self.crashes += 1
            self.save(number, OSError(errno.ENOSPC, "No space left on device"))
        elif kind == "corrupt":
            self.corrupt(number)
        else:
            stray = self.folder / ("step-999999", "step-99999999", ".partial-x", "notes")[number]
            stray.mkdir(exist_ok=True)
            self.strays.add(stray)
        assert all(stray.exists() for stray in self.strays)

    def save(self, fail_at: int, error: BaseException | None) -> None:
        self.disk.arm(fail_at, error)
        self.disk.before_each = self.check
        try:
            save(self.folder, self.step, self.keep, mark=self.crashes / 8)
        except (Dead, LatentDiffError):
            assert error is not None
        finally:
            self.disk.before_each = lambda: None
            self.disk.arm(0, None)
        self.check()

    def corrupt(self, number: int) -> None:
        files = sorted(path for path in self.folder.glob("step-0*/*"))
        if files:
            file = files[number % len(files)]
            content = bytearray(file.read_bytes() or b"x")
            content[number % len(content)] ^= 1
            file.write_bytes(content)


@pytest.mark.parametrize("size", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_whatever_happens_a_whole_checkpoint_stays(size):
    """So many histories of up to ten events."""

    @settings(max_examples=size, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(keep=st.integers(1, 3), events=st.lists(EVENT, min_size=1, max_size=10))
    def check(keep, events):
        with tempfile.TemporaryDirectory() as folder, counted_disk() as disk:
            history = History(Path(folder), keep, disk)
            for kind, number in events:
                history.happen(kind, number)

    check()


# Real processes and real disks

KILLS = """
import os, random, select, signal, sys, time
from pathlib import Path
import torch
from latentdiff.training.checkpoint import newest_checkpoint, save_checkpoint

torch.set_num_threads(1)
folder, generator, landed, rejected = Path(sys.argv[1]), random.Random(0), 0, []

def newest():
    return newest_checkpoint(folder, rejected.append)

def train(acknowledge):
    found = newest()
    for step in range(found.step + (generator.random() < 0.5) if found else 1, 10**6):
        value = torch.full((50_000,), float(step))
        save_checkpoint(folder, step, {"unet": {"a": value}, "ema": {"a": value}}, {"step": step}, keep=1)
        os.write(acknowledge, b"%d\\n" % step)

for kill in range(int(sys.argv[2])):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        train(writer)
        os._exit(1)
    os.close(writer)
    if kill == 0:
        select.select([reader], [], [], 20)
    time.sleep(generator.uniform(0, 0.12))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    acknowledged = [int(line) for line in os.read(reader, 10**6).split()]
    os.close(reader)
    landed += any(path.name.startswith(".") for path in folder.iterdir())
    found = newest()
    assert found is not None
    assert found.step >= max(acknowledged, default=0), (found, acknowledged)
    for name in ("unet", "ema"):
        assert bool((found.tensors(name)["a"] == found.step).all())
    assert found.metadata == {"step": found.step}
assert not rejected, rejected
print("in the middle of a save:", landed)
"""


def run(command: list[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


@pytest.mark.parametrize("size", [4, *(pytest.param(each, marks=pytest.mark.slow) for each in (12, 200))])
def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path, size):
    """Killed so many times at random moments, most of them within a save."""
    result = run([sys.executable, "-c", KILLS, str(tmp_path / "run"), str(size)], timeout=60 + size)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.rpartition(":")[2]) >= size // 5, "most kills missed: this test has lost its point"


FULL_DISK = """
import shutil, sys
from pathlib import Path
import torch
from latentdiff.errors import LatentDiffError
from latentdiff.training import checkpoint

folder = Path(sys.argv[1])
checkpoint.DISK_MARGIN = 0
checkpoint.save_checkpoint(folder, 1, {"x": {"t": torch.ones(1000)}}, {})

def refused():
    try:
        checkpoint.save_checkpoint(folder, 2, {"x": {"t": torch.ones(1_000_000)}}, {})
    except LatentDiffError as error:
        print(error)

refused()
usage = shutil.disk_usage(folder)
shutil.disk_usage = lambda folder: usage._replace(free=10**12)  # a quota, or another process that fills the disk
refused()
print([path.name for path in folder.iterdir()], checkpoint.newest_checkpoint(folder, print).step)
"""


def test_a_disk_that_is_really_full(tmp_path):
    mounted = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if shutil.which("unshare") is None or run(["unshare", "-Urm", "sh", "-c", mounted]).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    script = f'{mounted} && exec "$0" -c "$1" {tmp_path}'
    result = run(["unshare", "-Urm", "sh", "-c", script, sys.executable, FULL_DISK])
    assert result.returncode == 0, result.stderr
    before, during, state = result.stdout.splitlines()
    assert before.startswith(f"{tmp_path}: the disk is too full for a checkpoint: 4.0 MB needed, 1.0 MB available")
    assert during == f"{tmp_path}: the checkpoint of step 2 cannot be written (No space left on device)"
    assert state == "['step-00000001'] 1"
