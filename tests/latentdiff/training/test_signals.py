"""What sets the flag, what does not, and that the handlers are restored."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from latentdiff.training import signals
from latentdiff.training.signals import LAUNCHER_VARIABLES, StopFlag, StopReason
from latentdiff.training.stopped import Stopped, stops_between_steps


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_raises_the_flag(name):
    with StopFlag() as flag:
        assert flag.requested() is StopReason.NONE
        os.kill(os.getpid(), signal.Signals[name])
        assert flag.requested().name == name
    assert flag.requested().name == name


def test_the_first_reason_stays():
    with StopFlag() as flag:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert flag.requested() is StopReason.SIGTERM


def test_one_ctrl_c_may_arrive_twice(clock):
    with StopFlag() as flag:
        signal.raise_signal(signal.SIGINT)
        clock[0] += 1.9
        signal.raise_signal(signal.SIGINT)
        assert flag.requested() is StopReason.SIGINT


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_interrupts(clock, first):
    with StopFlag():
        signal.raise_signal(first)
        clock[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_second_sigterm_changes_nothing(clock):
    with StopFlag() as flag:
        signal.raise_signal(signal.SIGINT)
        clock[0] += 100
        signal.raise_signal(signal.SIGTERM)
        assert flag.requested() is StopReason.SIGINT


def test_handlers_are_put_back_also_after_an_exception():
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]

    def failing():
        with StopFlag():
            assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] != before
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopFlag() as flag:
            signal.raise_signal(signal.SIGINT)
            assert flag.requested() is StopReason.NONE
            signal.raise_signal(signal.SIGTERM)
            assert flag.requested() is StopReason.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_it_catches_nothing():
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    seen = []

    def work():
        with StopFlag() as flag:
            seen.append(([signal.getsignal(number) for number in signals.STOP_SIGNALS], flag.requested()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, StopReason.NONE)]


@pytest.mark.parametrize("launcher", LAUNCHER_VARIABLES)
def test_a_launcher_that_is_gone(monkeypatch, launcher):
    monkeypatch.setenv(launcher, "no")
    flag = StopFlag()
    assert flag.requested() is StopReason.NONE
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert flag.requested() is StopReason.LAUNCHER_EXITED


def test_process_1_may_be_the_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert StopFlag().requested() is StopReason.NONE


def test_a_shell_may_go(monkeypatch):
    flag = StopFlag()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert flag.requested() is StopReason.NONE


CHILD = """
import runpy, sys, time
flag = runpy.run_path(sys.argv[1])["StopFlag"]()
print("started", flush=True)
end = time.monotonic() + 20
while not flag.requested() and time.monotonic() < end:
    time.sleep(0.005)
print(flag.requested().name, flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def test_a_real_launcher_dies_without_a_word():
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, CHILD, signals.__file__],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ACCELERATE_MIXED_PRECISION": "no"},
    )
    with launcher, launcher.stdout as lines:
        assert lines.readline() == "started\n"
        launcher.send_signal(signal.SIGTERM)
        assert lines.readline() == "LAUNCHER_EXITED\n"
    assert launcher.returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_steps_ends_with_how_to_go_on(number):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    ending = rf"{number.name}; what is finished is in runs/x.*same command again"
    with pytest.raises(Stopped, match=ending) as stopped, stops_between_steps("runs/x"):
        signal.raise_signal(number)
    assert stopped.value.exit_code == 128 + number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
