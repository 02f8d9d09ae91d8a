"""Being asked to stop: by a signal, or by the end of the launcher that started this process."""

import os
import signal
import threading
import time
from enum import IntEnum
from types import FrameType
from typing import Self

ECHO = 2.0  # seconds within which a second SIGINT is the first one again: the terminal sends it, and so does a launcher
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by `accelerate launch` and by `torchrun`


class StopReason(IntEnum):
    """Why a training ends before its last step. Where processes have several, the largest is everybody's."""

    NONE = 0
    BROKEN_PICTURES = 1
    NOT_FINITE = 2
    SIGINT = 3
    LAUNCHER_GONE = 4
    SIGTERM = 5

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it; 1 where none was sent."""
        if self is StopReason.SIGINT:
            return 128 + signal.SIGINT
        return 128 + signal.SIGTERM if self >= StopReason.LAUNCHER_GONE else 1

    def sentence(self, why: str | None = None) -> str:
        """For the user; `why` is what this process knows of it."""
        if self is StopReason.LAUNCHER_GONE:
            return "the launcher is gone"
        if self in ASKING.values():
            return self.name
        return why or "too many broken pictures in another process"


ASKING = {signal.SIGTERM: StopReason.SIGTERM, signal.SIGINT: StopReason.SIGINT}


class StopFlag:
    """Remembers that this process was asked to stop, so that the loop can end between two steps and save.

    Use it as a context manager around the loop: within, SIGTERM and SIGINT only raise the flag; afterwards, whatever
    was there before handles them again. Outside the main thread no signal is caught, as Python allows it only there.
    A signal that the process was started to ignore stays ignored.

    A second SIGTERM changes nothing. A second Ctrl-C, two seconds or more after the first signal, raises
    KeyboardInterrupt wherever the process is: for the user who will not wait. It may strike while a checkpoint is
    written; that one is then lost, and the one before it stays whole, since a checkpoint appears by one rename.

    The launcher counts too, where there is one: `accelerate launch` with one process dies of a SIGTERM without passing
    it on. A plain parent, such as a shell that was logged out of after `nohup`, may go.
    """

    def __init__(self, parent: int | None = None) -> None:
        """Watch for `parent`, the process that started this one; None: whichever is the parent now."""
        self._reason = StopReason.NONE
        self._since = 0.0  # when the first signal came
        self._previous: dict[signal.Signals, signal.Handlers | object] = {}
        # Compared later with its value now, not with 1: in a container, process 1 may well be the launcher.
        self._launcher = (parent or os.getppid()) if any(name in os.environ for name in LAUNCHERS) else None

    def requested(self) -> StopReason:
        """The first reason to stop, NONE to go on. Cheap enough for every step."""
        if not self._reason and self._launcher is not None and os.getppid() != self._launcher:
            self._reason = StopReason.LAUNCHER_GONE
        return self._reason

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in ASKING:
                previous = signal.getsignal(number)
                # None: not set from Python, so it could not be put back.
                if previous is not None and previous is not signal.SIG_IGN:
                    self._previous[number] = previous
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous)  # type: ignore[arg-type]  # what getsignal gave

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self._since:
            self._since = now
            self._reason = self._reason or ASKING[signal.Signals(number)]
        elif number == signal.SIGINT and now - self._since >= ECHO:
            raise KeyboardInterrupt
