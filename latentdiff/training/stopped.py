"""The error that ends training early, and what raises it where no step is being taken."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import LatentDiffError
from .signals import STOP_SIGNALS, StopReason


class Stopped(LatentDiffError):
    """Error that ends training early, with a checkpoint saved; `exit_code` is 128 + the signal number, or 1."""

    def __init__(self, message: str, reason: StopReason) -> None:
        super().__init__(message)
        self.exit_code = reason.exit_code


@contextmanager
def stops_between_steps(output: str) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Stopped` where no `StopFlag` is active: before, between and after the stages."""
    received = signal.SIGINT

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGTERM)
    replaced = in_main_thread and previous not in (None, signal.SIG_IGN)
    if replaced:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        reason = STOP_SIGNALS[received]
        raise Stopped(f"stopped between training steps: {reason.name}; what is finished is in {output}. To go on, give "
                      "the same command again", reason) from None  # fmt: skip
    finally:
        if replaced:
            signal.signal(signal.SIGTERM, previous)
