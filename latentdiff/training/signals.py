"""Stop requests: by a signal, or by the exit of the launcher that started this process."""

import os
import signal
import threading
import time
from enum import IntEnum
from types import FrameType
from typing import Self

DUPLICATE_WINDOW = 2.0  # seconds; a second SIGINT within it is the same Ctrl-C, as terminal and launcher both send one
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by `accelerate launch` and `torchrun`


class StopReason(IntEnum):
    """Why training stops before its last step; if processes have different reasons, the largest applies to all."""

    NONE = 0
    BROKEN_PICTURES = 1
    NOT_FINITE = 2
    SIGINT = 3
    LAUNCHER_EXITED = 4
    SIGTERM = 5

    @property
    def exit_code(self) -> int:
        """128 + the signal number, as in shells; 1 if there was no signal."""
        if self is StopReason.SIGINT:
            return 128 + signal.SIGINT
        return 128 + signal.SIGTERM if self >= StopReason.LAUNCHER_EXITED else 1

    def sentence(self, why: str | None = None) -> str:
        """Describe the reason to the user; `why` is what this process knows about it."""
        if self is StopReason.LAUNCHER_EXITED:
            return "the launcher has exited"
        if self in STOP_SIGNALS.values():
            return self.name
        return why or "too many broken pictures in another process"


STOP_SIGNALS = {signal.SIGTERM: StopReason.SIGTERM, signal.SIGINT: StopReason.SIGINT}


class StopFlag:
    """Flag set by a stop request, so that the loop can finish its step and save a checkpoint.

    Use it as a context manager around the loop. Inside, SIGTERM and SIGINT only set the flag; afterwards the previous
    handlers are restored. Signals are caught only on the main thread, the only place where Python allows it. A signal
    that the process was started to ignore stays ignored.

    A second SIGTERM has no effect. A second Ctrl-C at least two seconds after the first signal raises KeyboardInterrupt
    wherever the process is, for users who will not wait. A checkpoint that is being written at that moment is lost, but
    the previous one stays intact.

    If `parent`, a PID that defaults to the current parent's, is a launcher, its exit also requests a stop: `accelerate
    launch` with one process dies of a SIGTERM without forwarding it. Any other parent, such as a shell, may exit.
    """

    def __init__(self, parent: int | None = None) -> None:
        self._reason = StopReason.NONE
        self._first_signal = 0.0  # time of the first signal
        self._previous: dict[signal.Signals, signal.Handlers | object] = {}
        # Compared later with this value, not with 1: in a container, the launcher may well be process 1.
        self._launcher = (parent or os.getppid()) if any(name in os.environ for name in LAUNCHER_VARIABLES) else None

    def requested(self) -> StopReason:
        """Return the first reason to stop, or NONE; cheap enough to call at every step."""
        if not self._reason and self._launcher is not None and os.getppid() != self._launcher:
            self._reason = StopReason.LAUNCHER_EXITED
        return self._reason

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                previous = signal.getsignal(number)
                # None: not installed from Python, so it could not be restored.
                if previous is not None and previous is not signal.SIG_IGN:
                    self._previous[number] = previous
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous)  # type: ignore[arg-type]  # from getsignal

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self._first_signal:
            self._first_signal = now
            self._reason = self._reason or STOP_SIGNALS[signal.Signals(number)]
        elif number == signal.SIGINT and now - self._first_signal >= DUPLICATE_WINDOW:
            raise KeyboardInterrupt
