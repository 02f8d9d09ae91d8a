"""A command keeps freed memory: a tensor of the same size costs no page faults the second time."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
{first}
for _ in range(4):  # alignment moves the second
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64, 2**20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
KEEP = "from latentdiff.cli.memory import keep_freed_memory; assert keep_freed_memory(torch.device('cpu')) == {kept}"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
@pytest.mark.parametrize(("first", "theirs", "kept"), [
    (KEEP, {}, True),
    (KEEP, {"MALLOC_ARENA_MAX": "8"}, False),
    (KEEP, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}, False),
    ("", {}, False),
])  # fmt: skip
def test_freed_memory_is_kept(first, theirs, kept):
    """256 MiB are 65,536 pages of 4 KiB, or 128 of 2 MiB."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in f"{name}={value}".upper()}
    environment |= theirs
    command = [sys.executable, "-c", SCRIPT.format(first=first.format(kept=kept))]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (int(found.stdout) < 100) == kept
