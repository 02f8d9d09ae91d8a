"""Several UNets called like one: who predicts what, and that nothing else is different from calling each of them."""

import copy

import pytest
import torch

from unet import Experts, UNet, UNetConfig, UNetError
from unet.experts import band_edges

CONFIG = UNetConfig(block_out_channels=(16, 32), layers_per_block=1, attention_levels=(1,), num_heads=2, context_dim=24,
                    norm_groups=8)  # fmt: skip


def new_unet():
    unet = UNet(CONFIG)
    for parameter in unet.parameters():
        if not parameter.any():  # a new UNet predicts zero for every input
            torch.nn.init.normal_(parameter, std=0.1)
    return unet


@pytest.fixture
def experts():
    return Experts([new_unet() for _ in range(3)], band_edges((250, 300), 1000))


def inputs(batch):
    return torch.randn(batch, 4, 8, 8), torch.randn(batch, 5, 24)


def test_bands():
    assert band_edges(4, 1000) == (0, 250, 500, 750, 1000)
    assert band_edges(3, 1000) == (0, 333, 666, 1000)
    assert band_edges((1, 999), 1000) == (0, 1, 999, 1000)
    assert band_edges(20, 20) == tuple(range(21))
    for wrong in (0, -1, 21, (), (0,), (20,), (5, 5), (6, 5), tuple(range(1, 21)), tuple(range(21))):
        with pytest.raises(UNetError, match=r"^experts="):
            band_edges(wrong, 20)


def test_every_row_has_the_expert_of_its_timestep(experts):
    """At the edges, between timesteps, beyond both ends; in any order; one timestep for all."""
    times = [0, 249, 249.5, 250, 299.99, 300, 999, -1.0, 1500.0]
    owners = [0, 0, 0, 1, 1, 2, 2, 0, 2]
    t = torch.tensor(times, dtype=torch.float64)
    assert experts.experts_at(t) == owners
    x, context = inputs(len(times))
    for order in (torch.arange(len(times)), torch.tensor(sorted(range(len(times)), key=owners.__getitem__))):
        found = experts(x[order], t[order], context[order])
        for row, place in enumerate(order.tolist()):
            one = slice(place, place + 1)
            alone = experts.unets[owners[place]](x[one], t[one], context[one])
            assert torch.allclose(found[row], alone[0], atol=1e-4, rtol=1e-5)  # rounding depends on the batch
    for value in (times[1], times[3]):
        expected = experts.unets[experts.expert_at(value)](x, torch.tensor(value), context)
        assert torch.equal(experts(x, torch.tensor(value), context), expected)
    with pytest.raises(UNetError, match=r"t has shape \(4,\)"):
        experts(x, t[:4], context)


def test_projections_give_the_same_bits_and_are_computed_when_it_is_their_turn(experts):
    """Down a schedule, keys and values are computed once for each expert that it visits, and for no other."""
    calls = []
    for number, unet in enumerate(experts.unets):
        unet.project_context = lambda context, unet=unet, number=number: (
            calls.append(number),
            UNet.project_context(unet, context),
        )[1]
    x, context = inputs(2)
    grid = torch.tensor([900, 600, 301, 200, 100, 0])
    times, prompt = experts.project_time(grid), experts.project_context(context)
    for row, t in enumerate(grid):
        step = [each[row : row + 1] for each in times]
        assert torch.equal(experts(x, step, prompt), experts(x, t, context))
        assert torch.equal(experts(x, step, context), experts(x, t, prompt))
    assert calls == [2, 0]
    with pytest.raises(UNetError, match="several experts"):
        experts(x, [each[2:4] for each in times], prompt)


def test_gradients_reach_the_experts_that_are_called(experts):
    """None without a call; zero for one that is called without a row, and the prediction is the same."""
    x, context = inputs(4)
    t = torch.tensor([299, 250, 260, 270])
    experts(x, t, context).square().sum().backward()
    assert [unet.conv_in.weight.grad is None for unet in experts.unets] == [True, False, True]
    t = torch.tensor([280, 270, 10, 0])
    calls = experts.calls(t, also={2})
    assert calls.counts == ((0, 2), (1, 2), (2, 0))
    assert calls.order == (2, 3, 0, 1)
    found = experts(x, t, context, calls)
    assert torch.equal(found, experts(x, t, context))
    found.square().sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in experts.unets[2].parameters())
    assert all(unet.conv_in.weight.grad.any() for unet in list(experts.unets)[:2])


def test_experts_split_from_one_unet_equal_it(experts):
    """Bit for bit where a batch falls to one of them; up to rounding, which depends on the batch, elsewhere."""
    unet = new_unet()
    split = Experts([copy.deepcopy(unet) for _ in range(3)], experts.edges)
    x, context = inputs(6)
    for start in experts.edges[:-1]:
        t = torch.arange(start, start + 6)
        assert torch.equal(split(x, t, context), unet(x, t, context))
    t = torch.arange(0, 600, 100)
    assert torch.allclose(split(x, t, context), unet(x, t, context), atol=1e-4, rtol=1e-5)


def test_experts_cannot_look_back():
    looks_back = UNetConfig(**{**vars(CONFIG), "trajectory_attention": 2})
    with pytest.raises(UNetError, match="one cannot look back at what another computed"):
        Experts([UNet(looks_back), UNet(looks_back)], (0, 5, 10))


def test_experts_have_one_shape(experts):
    other = UNet(UNetConfig(**{**vars(CONFIG), "context_dim": 32}))
    with pytest.raises(UNetError, match="of one shape"):
        Experts([new_unet(), other], (0, 500, 1000))
    with pytest.raises(UNetError, match="2 UNets for 3 bands"):
        Experts([new_unet(), new_unet()], (0, 250, 500, 1000))
