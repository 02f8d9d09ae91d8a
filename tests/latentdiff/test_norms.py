"""GroupNorm in half precision: as exact as PyTorch's, in channels-last memory, and never by an untried kernel."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentdiff import norms
from latentdiff.norms import GroupNorm, torch_kernels

SHAPES = [(2, 96, 32, 17, 13), (3, 48, 8, 8, 8), (1, 192, 32, 1, 1), (2, 320, 32, 40, 40), (5, 6, 3, 3, 5)]
KERNELS = [torch_kernels]
try:  # in an environment with Triton: TRITON_INTERPRET=1 python -m pytest tests/latentdiff/test_norms.py
    from latentdiff.norms import triton_kernels
except ImportError:
    pass
else:
    KERNELS.append(triton_kernels)


def pytorch(x, groups, weight, bias, eps, silu):
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def with_gradients(function, x, weight, bias, upstream):
    inputs = [each.detach().requires_grad_() for each in (x, weight, bias)]
    y = function(*inputs)
    return (y, *torch.autograd.grad(y, inputs, upstream.to(y.dtype)))


@pytest.fixture(params=KERNELS, ids=lambda kernels: kernels.__name__.split(".")[-1])
def kernels(request, monkeypatch):
    monkeypatch.setattr(norms, "kernels_for", lambda device: request.param)
    return request.param


def inputs(shape, offset, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    batch, width, groups, height, across = shape
    x, upstream = (torch.randn(batch, width, height, across, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(width, generator=generator).to(dtype).float() for _ in range(2))
    x = (x + offset).to(dtype).to(memory_format=torch.channels_last)
    return x, weight, bias, upstream.to(dtype).to(memory_format=torch.channels_last), groups


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of NumPy, in Triton's interpreter
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_exact_as_pytorch(kernels, shape, silu, offset, dtype):
    """Against float64: the error is at most 1.2 times that of PyTorch's, which rounds before SiLU as well.

    Triton's interpreter cuts bfloat16 off instead of rounding it, so there the error may be twice as large.
    """
    cut = 2 if kernels is not torch_kernels and dtype == torch.bfloat16 else 1
    x, weight, bias, upstream, groups = inputs(shape, offset, dtype)
    norm = GroupNorm(groups, shape[1], eps=1e-5, silu=silu)

    def ours(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    exact = with_gradients(lambda x, w, b: pytorch(x, groups, w, b, 1e-5, silu), x.double(), weight.double(),
                           bias.double(), upstream)  # fmt: skip
    theirs = with_gradients(lambda x, w, b: pytorch(x, groups, w.to(dtype), b.to(dtype), 1e-5, silu), x,
                            weight, bias, upstream)  # fmt: skip
    rounded = with_gradients(ours, x, weight, bias, upstream)
    with torch.no_grad():  # another kernel on CPUs
        alone = ours(x, weight, bias)
    assert (alone.dtype, alone.is_contiguous(memory_format=torch.channels_last)) == (dtype, True)
    assert rounded[0].dtype == rounded[1].dtype == dtype
    assert rounded[0].is_contiguous(memory_format=torch.channels_last)
    assert rounded[2].dtype == rounded[3].dtype == torch.float32
    names, rows = ("y", "dx", "dweight", "dbias"), list(zip(rounded, theirs, exact, strict=True))
    for name, (mine, other, truth) in zip((*names, "y alone"), (*rows, (alone, *rows[0][1:])), strict=True):
        error, allowed = ((each.double() - truth).abs().max().item() for each in (mine, other))
        floor = torch.finfo(dtype).eps * truth.abs().max().item() / 2  # of rounding the result itself
        assert error <= cut * max(1.2 * allowed, floor), name


@pytest.mark.parametrize("constant", [1.0, 10.0, 1000.0])
def test_nothing_cancels_in_nearly_constant_pictures(constant):
    """One pixel differs by a thousandth. In float32, PyTorch's own gradients are off by their whole size here."""
    x = torch.full((1, 8, 64, 64), constant)
    x[..., 0, 0] *= 1.001
    x = x.half().to(memory_format=torch.channels_last)
    weight, bias, upstream = torch.randn(8), torch.randn(8), torch.randn(x.shape).half()
    exact = with_gradients(lambda x, w, b: pytorch(x, 4, w, b, 1e-6, True), x.double(), weight.double(), bias.double(),
                           upstream)  # fmt: skip
    ours = with_gradients(lambda x, w, b: norms.half_group_norm(x, w, b, 4, 1e-6, True, torch_kernels), x, weight, bias,
                          upstream)  # fmt: skip
    for name, mine, truth in zip(("y", "dx", "dweight", "dbias"), ours, exact, strict=True):
        error = (mine.double() - truth).abs().max() / truth.abs().max()
        assert error < 1e-3, name


@pytest.mark.parametrize("shape", [(0, 32, 4, 4), (2, 32, 0, 4)])
def test_of_nothing_gradients_are_zero(shape):
    x, weight, bias = torch.zeros(shape).half(), torch.ones(32), torch.zeros(32)
    upstream = torch.zeros(shape)
    _, _, *gradients = with_gradients(lambda x, w, b: norms.half_group_norm(x, w, b, 8, 1e-6, True, torch_kernels), x,
                                      weight, bias, upstream)  # fmt: skip
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.skipif(len(KERNELS) == 1, reason="PyTorch's own LayerNorm serves without Triton")
@pytest.mark.parametrize("shape", [(2, 300, 192), (1, 5, 1280), (77, 96), (9, 1000, 64)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_layer_norm_as_exact_as_pytorch(shape, offset):
    """In float16, because Triton's interpreter cuts bfloat16 off instead of rounding it."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, upstream = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator).half().float() for _ in range(2))
    x, upstream = (x + offset).half(), upstream.half()

    def theirs(x, w, b):
        return F.layer_norm(x, shape[-1:], w.to(x.dtype), b.to(x.dtype), 1e-5)

    exact = with_gradients(theirs, x.double(), weight.double(), bias.double(), upstream)
    pytorchs = with_gradients(theirs, x, weight, bias, upstream)
    ours = with_gradients(lambda x, w, b: norms.half_layer_norm(x, w, b, 1e-5, KERNELS[1]), x, weight, bias, upstream)
    for name, mine, other, truth in zip(("y", "dx", "dweight", "dbias"), ours, pytorchs, exact, strict=True):
        error, allowed = ((each.double() - truth).abs().max().item() for each in (mine, other))
        floor = torch.finfo(torch.float16).eps * truth.abs().max().item() / 2
        assert error <= max(1.2 * allowed, floor), name


@pytest.mark.parametrize("silu", [False, True])
def test_float32_and_compiled_models_keep_pytorchs(silu):
    x, weight, bias, _, groups = inputs(SHAPES[0], 1.0, torch.float32)
    norm = GroupNorm(groups, 96, eps=1e-5, silu=silu)
    norm.load_state_dict({"weight": weight, "bias": bias})
    one, other = norm(x), pytorch(x, groups, weight, bias, 1e-5, silu)
    assert torch.equal(one, other)
    assert list(norm.state_dict()) == list(nn.GroupNorm(groups, 96).state_dict())


def test_gradient_checkpointing_and_other_memory_formats(kernels):
    x, _, _, upstream, groups = inputs(SHAPES[1], 0.0, torch.bfloat16)
    norm = GroupNorm(groups, 48, eps=1e-5, silu=True)
    with_gradient = x.contiguous().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(norm, with_gradient, use_reentrant=False)
    y.backward(upstream.contiguous())
    again = x.detach().requires_grad_()
    expected = norm(again)
    assert torch.equal(y, expected)
    expected.backward(upstream)
    assert torch.equal(with_gradient.grad, again.grad)


def test_results_do_not_depend_on_the_batch(kernels):
    x, _, _, _, groups = inputs((5, 96, 32, 16, 16), 0.0, torch.bfloat16)
    norm = GroupNorm(groups, 96, eps=1e-5, silu=True)
    assert torch.equal(norm(x), torch.cat([norm(x[i : i + 1]) for i in range(len(x))]))


def test_kernels_that_compute_the_right_thing_pass(kernels):
    assert norms.failure(kernels, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "wrong", "found"),
    [
        (
            "normalize",
            lambda right: lambda *a, out: right(a[0] + 0.1 * a[0] ** 2, *a[1:], out=out),
            "the result of 96 channels is wrong",
        ),
        (
            "normalize",
            lambda right: lambda *a, out: (right(*a, out=out), out.fill_(float("nan")))[0],
            "the result of 96 channels is wrong by nan",
        ),
        ("normalize", lambda _: lambda *a, out: 1 / 0, "ZeroDivisionError"),
        ("gradients", lambda right: lambda *a, out: (right(*a, out=out), out.mul_(2))[0], "the gradient of"),
        (
            "gradients",
            lambda right: lambda *a, out: (2 * right(*a, out=out)[0], right(*a, out=out)[1]),
            "the weight gradient of",
        ),
        (
            "gradients",
            lambda right: lambda *a, out: (right(*a, out=out)[0], 2 * right(*a, out=out)[1]),
            "the bias gradient of",
        ),
    ],
)
def test_a_kernel_made_wrong_on_purpose_is_not_used(name, wrong, found, monkeypatch):
    functions = {each: getattr(torch_kernels, each) for each in ("normalize", "gradients")}
    broken = SimpleNamespace(**functions | {name: wrong(functions[name])})
    assert found in norms.failure(broken, torch.device("cpu"))
    monkeypatch.setattr(norms, "failure", lambda kernels, device: "the result is wrong")
    monkeypatch.setitem(__import__("sys").modules, "latentdiff.norms.triton_kernels", broken)
    monkeypatch.setattr(norms, "triton_kernels", broken, raising=False)
    norms.trusted_kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"norms run in plain torch, as their Triton kernels fail on cuda:0: the r"):
        assert norms.trusted_kernels(0) is torch_kernels
    norms.trusted_kernels.cache_clear()
