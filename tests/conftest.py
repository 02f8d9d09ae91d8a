"""What all tests share: no network, one stream of random numbers, folders that are made once, a ruler."""

import os
import shutil
import signal
import sys
import types

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from filelock import FileLock

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
torch.set_num_threads(1)  # tensors here are tiny: a second thread gains nothing, and waits for whatever else runs


def pytest_configure(config):
    is_controller = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not is_controller:  # pytest-xdist's controller runs no test, and its workers wait for it
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Fill a folder once for all worker processes of a test session."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def make(name, fill):
        with FileLock(root / f"{name}.lock"):
            if not (root / f"{name}.done").exists():
                shutil.rmtree(root / name, ignore_errors=True)  # of a fill that failed
                fill(root / name)
                (root / f"{name}.done").touch()
        return root / name

    return make


@pytest.fixture
def relative_error():
    """Norm of the difference over the norm of the reference, in float64."""

    def measure(value: torch.Tensor, reference: torch.Tensor) -> float:
        value, reference = value.detach().double(), reference.detach().double()
        return float((value - reference).norm() / reference.norm())

    return measure


@pytest.fixture
def xformers(monkeypatch):
    """Stands in for xformers, which runs on NVIDIA GPUs only, with its documented (B, N, h, C/h) layout; its calls."""
    calls = []

    def memory_efficient_attention(q, k, v):
        calls.append(q.shape)
        weights = torch.einsum("bnhc,bmhc->bhnm", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("bhnm,bmhc->bnhc", weights, v)

    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    return calls


@pytest.fixture
def check_gradients():
    """Every parameter's gradient against the reference's, relative to max(its norm, 1e-6 of the largest norm).

    The bias of an attention's keys is left out in float32: it adds the same to all logits of a query, so its gradient
    is zero, and what either side has there is rounding, below 1e-8 of the largest gradient.
    """

    def check(model: torch.nn.Module, reference: torch.nn.Module, tolerance: float) -> None:
        expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert found.keys() == expected.keys()
        largest = max(float(grad.norm()) for grad in expected.values())
        errors = {}
        for name, grad in expected.items():
            difference = float((found[name] - grad).norm())
            if name.endswith("to_k.bias") and grad.dtype == torch.float32:
                assert difference < 1e-8 * largest, name
            else:
                errors[name] = difference / max(float(grad.norm()), 1e-6 * largest)
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.1e}"

    return check
