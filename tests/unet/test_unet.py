"""The UNet on its own: sizes, cached projections, memory layout, compilation, checkpointing, invalid inputs."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unet import UNet, UNetConfig, UNetError
from unet.attention import SpatialTransformer
from unet.blocks import ResBlock

SMALL = UNetConfig(
    block_out_channels=(32, 64), attention_levels=(0, 1), num_heads=4, context_dim=24, norm_groups=8, layers_per_block=2
)

FEW_LAYERS = replace(SMALL, layers_per_block=1, attention_levels=(1,))  # every kind of layer: tracing takes seconds


def randomized(config: UNetConfig = SMALL) -> UNet:
    """A UNet that does not predict zero: its zero-initialized layers get torch's default initialization."""
    unet = UNet(config).eval()
    for layer in unet.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) and not layer.weight.any():
            layer.reset_parameters()
    return unet


@pytest.fixture
def unet() -> UNet:
    return randomized()


@pytest.fixture
def inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 981]), torch.randn(2, 7, 24)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (UNetConfig(), 859_520_964),
        (UNetConfig(num_heads=(5, 10, 20, 20), linear_projection=True, context_dim=1024), 865_910_724),
        (UNetConfig(context_dim=1280), 872_300_484),
    ],
    ids=["sd1", "sd2", "ldm_text2im"],
)
def test_parameter_counts(config, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in UNet(config).parameters()) == count


def test_equal_networks_have_equal_configs():
    """However the same network is written, including after a round trip through a file."""
    config = UNetConfig(block_out_channels=[64, 128], attention_levels=[1, 0, 1], num_heads=None, norm_groups=8)
    assert config == UNetConfig(block_out_channels=(64, 128), attention_levels=(0, 1), num_heads=(1, 2), norm_groups=8)
    assert UNetConfig.from_diffusers(config.to_diffusers()) == config
    assert UNetConfig(num_heads=(8, 8, 8, 8)) == UNetConfig(num_heads=8)


def test_a_new_network_predicts_zero_and_learns(inputs):
    unet = UNet(SMALL)
    out = unet(*inputs)
    assert not out.any()
    for layer in unet.modules():  # each ResBlock and transformer starts as its skip connection alone
        if isinstance(layer, ResBlock):
            assert not layer.conv2.weight.any()
            assert layer.conv1.weight.any()
        if isinstance(layer, SpatialTransformer):
            assert not layer.proj_out.weight.any()
            assert layer.proj_in.weight.any()
    (out - 1).square().mean().backward()
    assert unet.conv_out.weight.grad.any()


@pytest.mark.parametrize("context_dim", [24, 32])
def test_cached_keys_and_values_are_exact(context_dim):
    """32 is also the width of a level: cross-attention must be recognized by its position, not by its sizes."""
    unet = randomized(UNetConfig(**{**vars(SMALL), "context_dim": context_dim}))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 981]), torch.randn(2, 7, context_dim)
    with torch.no_grad():
        cached = unet.project_context(context)
        assert len(cached) == 11
        assert torch.equal(unet(x, t, cached), unet(x, t, context))


def test_cached_time_projections_are_exact(unet, inputs, relative_error):
    """A row of the table must work for any batch size, and equal what the step itself would have computed."""
    x, _, context = inputs
    grid = torch.arange(999, -1, -20)
    with torch.no_grad():
        table = unet.project_time(grid)
        for step in (0, 17, 49):
            row = [shift[step : step + 1] for shift in table]
            for size in (1, 2):
                cached = unet(x[:size], row, context[:size])
                assert torch.equal(cached, unet(x[:size], grid[step], context[:size]))
                repeated = unet(x[:size], grid[step].repeat(size), context[:size])  # rounds differently for two rows
                assert relative_error(cached, repeated) < 3e-6


def test_gradients_reach_every_parameter(unet, inputs):
    """A layer that forward skips would never be trained, and would hang DDP."""
    unet(*inputs).square().sum().backward()
    assert not [
        name for name, parameter in unet.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]


class LayoutWatch(TorchDispatchMode):
    """Records clones of feature maps, and convolutions whose input, weight or output is not channels-last."""

    def __init__(self):
        super().__init__()
        self.wrong = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default and args[0].dim() == 4:
            self.wrong.append(f"clone of {tuple(args[0].shape)}")
        if "convolution" in str(func):
            for tensor in (args[0], args[1], out):
                if not tensor.is_contiguous(memory_format=torch.channels_last):
                    self.wrong.append(f"{func} on {tuple(tensor.shape)} with strides {tensor.stride()}")
        return out


@pytest.mark.parametrize("opened", [False, True], ids=["new", "from_pretrained"])
def test_channels_last_end_to_end(unet, inputs, tmp_path, opened):
    """Also for a contiguous input: a single copy at the start, none after it."""
    x, t, context = inputs
    assert not x.is_contiguous(memory_format=torch.channels_last)
    if opened:
        unet.save_pretrained(tmp_path)
        unet = UNet.from_pretrained(tmp_path)
    with torch.no_grad(), LayoutWatch() as watch:
        out = unet(x, t, context)
        out = unet(out, t, context)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not watch.wrong


@pytest.mark.slow
def test_compiles_without_graph_break(inputs):
    """fullgraph=True raises at a graph break; the eager backend, because this tests tracing, not code generation."""
    unet, (x, t, context) = randomized(FEW_LAYERS), inputs
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, t, context), unet(x, t, context))
        kv, times = unet.project_context(context), unet.project_time(t)
        assert torch.equal(compiled(x, times, kv), unet(x, times, kv))


@pytest.mark.slow
def test_inductor_gives_the_same(unet, inputs, relative_error):
    with torch.no_grad():
        assert relative_error(torch.compile(unet, fullgraph=True)(*inputs), unet(*inputs)) < 1e-5


def test_gradient_checkpointing_recomputes_the_same(unet, inputs):
    def run() -> tuple[int, list[torch.Tensor]]:
        saved = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel() if tensor.requires_grad and not tensor.is_leaf else 0
            return tensor

        unet.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = unet(*inputs).square().mean()
        loss.backward()
        return saved, [parameter.grad for parameter in unet.parameters()]

    plain, expected = run()
    unet.enable_gradient_checkpointing()
    fewer, found = run()
    assert fewer < plain / 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    unet.enable_gradient_checkpointing(False)
    assert run()[0] == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(unet, inputs, relative_error, dtype):
    x, t, context = inputs
    with torch.no_grad():
        expected = unet(x, t, context)
        found = unet.to(dtype)(x.to(dtype), t, context.to(dtype))
    assert found.dtype == dtype
    assert relative_error(found, expected) < (3e-2 if dtype == torch.bfloat16 else 1e-5)


def test_timesteps_keep_their_digits_in_bfloat16(unet, inputs):
    """bfloat16 rounds 981 to 980: sinusoids must be computed from the original timestep."""
    unet = unet.bfloat16()
    one, other = (torch.stack(unet.project_time(torch.tensor([t]))[:1]) for t in (980, 981))
    assert not torch.equal(one, other)


def test_autocast_takes_float32_inputs(unet, inputs, relative_error):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(unet(*inputs).float(), unet.float()(*inputs)) < 3e-2


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_upcast_attention_runs_in_float32(inputs, autocast):
    """Autocast would cast back to bfloat16, since attention is on its list."""
    unet = randomized(replace(FEW_LAYERS, upcast_attention=True))
    x, t, context = inputs
    if not autocast:
        unet, x, context = unet.bfloat16(), x.bfloat16(), context.bfloat16()

    class Watch(TorchDispatchMode):
        seen: ClassVar[set] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "scaled_dot_product" in str(func):
                self.seen.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), Watch():
        assert unet(x, t, context).dtype == torch.bfloat16
    assert Watch.seen == {torch.float32}
    with torch.no_grad():
        assert torch.compile(unet, fullgraph=True, backend="eager")(x, t, context).dtype == x.dtype


def test_float_and_scalar_timesteps(unet, inputs, relative_error):
    x, t, context = inputs
    with torch.no_grad():
        assert torch.equal(unet(x, t.float(), context), unet(x, t, context))
        assert relative_error(unet(x, torch.tensor(3), context), unet(x, torch.tensor([3, 3]), context)) < 3e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, 8)}, r"x has shape \(2, 3, 8, 8\); expected \(B, 4, H, W\)"),
        ({"x": torch.zeros(4, 8, 8)}, r"x has shape \(4, 8, 8\)"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
        (
            {"x": torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)},
            r"x is torch\.bfloat16 and the weights are torch\.float32",
        ),
        ({"x": torch.zeros(2, 4, 8, 8, dtype=torch.uint8)}, r"x is torch\.uint8"),
        ({"t": torch.zeros(3, dtype=torch.int64)}, r"t has shape \(3,\); expected \(\) or \(2,\)"),
        ({"t": torch.zeros(2, dtype=torch.int32)}, r"t is torch\.int32; expected int64"),
        ({"t": torch.zeros(2, dtype=torch.bool)}, r"t is torch\.bool"),
        ({"t": torch.zeros(2, dtype=torch.bfloat16)}, r"t is torch\.bfloat16"),
        ({"t": [torch.zeros(3, 32)] * 12}, r"projections for a batch of 3; x has 2"),
        ({"x": torch.zeros(2, 4, 0, 8)}, r"x has shape \(2, 4, 0, 8\)"),
        ({"context": torch.zeros(2, 0, 24)}, r"context has shape \(2, 0, 24\)"),
        ({"context": torch.zeros(2, 7, 24).double()}, r"context is torch\.float64 and the weights are torch\.float32"),
        ({"t": []}, r"projections for 0 ResBlocks; this UNet has 12"),
        ({"context": torch.zeros(2, 7, 25)}, r"context has shape \(2, 7, 25\); expected \(2, L, 24\)"),
        ({"context": torch.zeros(1, 7, 24)}, r"context has shape \(1, 7, 24\)"),
        ({"context": torch.zeros(2, 24)}, r"context has shape \(2, 24\)"),
        ({"context": []}, r"keys and values for 0 cross-attentions; this UNet has 11"),
        ({"context": [(torch.zeros(3, 4, 7, 8),) * 2] * 11}, r"for a batch of 3; x has 2"),
    ],
)
def test_wrong_inputs(unet, inputs, change, message):
    arguments = {**dict(zip(("x", "t", "context"), inputs, strict=True)), **change}
    with pytest.raises(UNetError, match=message):
        unet(**arguments)


def test_wrong_inputs_of_the_projections(unet):
    with pytest.raises(UNetError, match=r"context has shape \(2, 7, 25\)"):
        unet.project_context(torch.zeros(2, 7, 25))
    with pytest.raises(UNetError, match=r"context has shape \(7, 24\)"):
        unet.project_context(torch.zeros(7, 24))
    with pytest.raises(UNetError, match=r"t has shape \(\); expected \(S,\), one timestep per step"):
        unet.project_time(torch.tensor(3))
    with pytest.raises(UNetError, match=r"t is torch\.int32"):
        unet.project_time(torch.zeros(3, dtype=torch.int32))


def test_attention_backends(unet):
    with pytest.raises(UNetError, match="'flash' is unknown; choose 'sdpa' or 'xformers'"):
        unet.set_attention_backend("flash")
    unet.set_attention_backend("sdpa")
    try:
        import xformers  # noqa: F401
    except ImportError:
        with pytest.raises(UNetError, match=r"not installed: pip install 'latentdiff\[xformers\]'"):
            unet.set_attention_backend("xformers")


def test_xformers_gets_its_own_layout(unet, inputs, xformers, relative_error):
    with torch.no_grad():
        expected = unet(*inputs)
        unet.set_attention_backend("xformers")
        assert relative_error(unet(*inputs), expected) < 1e-5
    assert xformers


def test_attention_written_out_is_as_exact_as_the_fused_kernel(relative_error, monkeypatch):
    """In bfloat16 on a CPU: outputs and gradients, against float64, within 1.5 times the fused kernel's error."""
    from unet import attention

    q, k, v, direction = torch.randn(4, 2, 3, 64, 32).unbind()

    def results(dtype):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
        out = attention.sdpa(*inputs)
        return [out, *torch.autograd.grad(out, inputs, direction.to(dtype))]

    exact, written = results(torch.float64), results(torch.bfloat16)
    monkeypatch.setattr(attention, "UNFUSED", 0)
    fused = results(torch.bfloat16)
    assert any(not torch.equal(one, other) for one, other in zip(written, fused, strict=True))
    for reference, one, other in zip(exact, written, fused, strict=True):
        assert relative_error(one, reference) < 1.5 * relative_error(other, reference)
