"""Which CPUs compute in bfloat16 by default."""

import pytest
import torch

from latentdiff.device import computes_in_bf16, multiplies_bf16


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ({"cpu_name": "Intel Xeon", "amx_bf16": True, "avx512_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "amx_bf16": False, "avx512_bf16": True}, False),  # half of float32's rate
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_multiplies_bf16(cpu, expected):
    assert multiplies_bf16(cpu) is expected


@pytest.mark.parametrize("found", [True, False])
def test_this_cpu_is_asked(monkeypatch, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Intel Xeon", "amx_bf16": found})
    assert computes_in_bf16(torch.device("cpu")) is found
