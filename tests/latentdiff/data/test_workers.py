"""Worker processes that die or hang: new ones go on with the same items in the same order."""

import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from latentdiff.data import workers
from latentdiff.data.workers import WorkersDiedError, load_ahead

ACCIDENTS = {
    "os._exit": lambda: os._exit(3),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(600),
}


class Dangerous(Dataset):
    """Counts; at item 5 there is an accident, so many times."""

    def __init__(self, folder: Path, accident: str, times: int) -> None:
        self.folder, self.accident, self.times = folder, accident, times

    def __getitem__(self, number):
        if number == 5 and (done := len(os.listdir(self.folder))) < self.times:
            (self.folder / str(done)).touch()
            ACCIDENTS[self.accident]()
        return number


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(workers, "TIMEOUT", 1.0)
    monkeypatch.setattr(workers, "POLL", 0.3)


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_worker_that_dies_is_replaced(tmp_path, caplog, accident):
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert list(load_ahead(Dangerous(tmp_path, accident, 1), range(2, 14), 2)) == list(range(2, 14))
    assert "a process that reads pictures died; starting new ones" in caplog.text
    assert multiprocessing.active_children() == []  # one that sleeps would keep this process from ending
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("accident", ["SIGSEGV", pytest.param("sleep", marks=pytest.mark.slow)])
def test_workers_that_die_again_and_again(tmp_path, accident):
    with pytest.raises(WorkersDiedError, match="died 3 times in a row"):
        list(load_ahead(Dangerous(tmp_path, accident, 99), range(5, 14), 1))
    assert len(os.listdir(tmp_path)) == 3
    assert multiprocessing.active_children() == []
