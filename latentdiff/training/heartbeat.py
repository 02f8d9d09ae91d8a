"""Steps of several processes that hang: they end in minutes rather than hours, and say which process lags.

    <stage>/heartbeats/<rank>.json   what each process does: a step, or something else that may take long

Within a step all processes wait for one another. What else they do (reading pictures, encoding, validating, saving) may
take one of them as long as it likes. Where a step takes far longer than any before, each process writes down where it
is: those that wait for the others are in `torch.autograd` or `torch.distributed`, the one that lags is elsewhere.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .launch import Launch

STALL_SECONDS, STALL_FACTOR = 300.0, 20.0  # a step may take the longer of both, the second times the longest so far
FIRST_SECONDS = 3600.0  # of the first step of a launch, which may compile
WAITING = (os.path.join("torch", "autograd"), os.path.join("torch", "distributed"))


class Heartbeat:
    """Watches the steps of this process; all of them have one, with files in the same folder."""

    def __init__(self, run: Launch, folder: Path) -> None:
        self.rank, self.count = run.accelerator.process_index, run.accelerator.num_processes
        self.folder, self.main_thread, self.lock = folder / "heartbeats", threading.get_ident(), threading.Lock()
        self.began, self.longest, self.step_number = 0.0, 0.0, 0  # began: 0 outside of a step
        if self.count > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(inside=False)
            threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch a step."""
        if self.count == 1:
            yield
            return
        with self.lock:
            self.step_number, self.began = number, time.monotonic()
            self._write(inside=True)
        try:
            yield
        finally:
            with self.lock:
                self.longest = max(self.longest, time.monotonic() - self.began)
                self.began = 0.0
                self._write(inside=False)

    def _limit(self) -> float:
        return max(STALL_SECONDS, STALL_FACTOR * self.longest) if self.longest else FIRST_SECONDS

    def _watch(self) -> None:
        while True:
            time.sleep(min(10.0, self._limit() / 10))
            began = self.began
            if not began or time.monotonic() - began < self._limit():
                continue
            with self.lock:
                if self.began != began:  # the step has just ended
                    continue
                self._write(inside=True, **self._place())
            time.sleep(2 * min(10.0, self._limit() / 10))  # so that all have written where they are
            others = self._read()
            if self.began == began and all(state.get("inside") and "where" in state for state in others.values()):
                self._give_up(others)

    def _place(self) -> dict[str, Any]:
        """Return where the main thread is, and whether it waits for the other processes there."""
        frame = sys._current_frames().get(self.main_thread)
        inner = traceback.extract_stack(frame)[-1] if frame is not None else None
        where = f"{inner.name} ({inner.filename}:{inner.lineno})" if inner else "an unknown place"
        return {"where": where, "waits": inner is not None and any(part in inner.filename for part in WAITING)}

    def _give_up(self, states: dict[int, dict[str, Any]]) -> None:
        least = min(state["step"] for state in states.values())
        lagging = [rank for rank, state in states.items() if state["step"] == least and not state["waits"]]
        who = "all processes wait for one another"
        if lagging:
            places = (f"rank {rank} is in {states[rank]['where']}" for rank in lagging)
            who = f"rank {', '.join(map(str, lagging))} lags: {'; '.join(places)}"
        sys.stderr.write(
            f"error: rank {self.rank}: step {self.step_number} has not ended for {self._limit():.0f} s, so this run is "
            f"given up; {who}. Start it again to go on from its newest checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(1)  # the main thread cannot be interrupted in a collective

    def _write(self, *, inside: bool, **more: Any) -> None:
        path = self.folder / f"{self.rank}.json"
        try:
            path.with_suffix(".new").write_text(json.dumps({"step": self.step_number, "inside": inside, **more}))
            os.replace(path.with_suffix(".new"), path)
        except OSError:  # a full disk: the run itself will say so
            pass

    def _read(self) -> dict[int, dict[str, Any]]:
        states = {}
        for rank in range(self.count):
            try:
                states[rank] = json.loads((self.folder / f"{rank}.json").read_text())
            except (OSError, ValueError):
                states[rank] = {}
        return states
