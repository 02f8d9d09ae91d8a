"""The discriminator's output shapes and independence of the batch; the adversarial losses in closed form."""

import math

import pytest
import torch

from latentdiff.errors import LatentDiffError
from latentdiff.training.discriminator import Discriminator, discriminator_loss, generator_loss

LOGITS = torch.tensor([-2.0, -0.5, 0.5, 3.0])


@pytest.mark.parametrize(("size", "found"), [((24, 24), (1, 1)), ((32, 32), (2, 2)), ((70, 100), (6, 10))])
def test_sizes(size, found):
    assert Discriminator(8)(torch.zeros(2, 3, *size)).shape == (2, 1, *found)


def test_a_large_picture():
    with torch.device("meta"):
        assert Discriminator()(torch.zeros(1, 3, 512, 512)).shape == (1, 1, 62, 62)


def test_as_many_parameters_as_ldms():
    """NLayerDiscriminator with defaults: BatchNorm has as many as GroupNorm, and neither needs a bias before it."""
    convolutions = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 1) + 64 + 1
    norms = 2 * (128 + 256 + 512)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Discriminator().parameters()) == convolutions + norms


def test_widths_stop_growing():
    widths = [layer.out_channels for layer in Discriminator(8, num_layers=5).layers if hasattr(layer, "out_channels")]
    assert widths == [8, 16, 32, 64, 64, 64, 1]


def test_a_picture_is_judged_by_itself():
    model, pixels = Discriminator(8), torch.rand(4, 3, 32, 32) * 2 - 1
    alone = torch.cat([model(picture[None]) for picture in pixels])
    torch.testing.assert_close(model(pixels), alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.eval()(pixels), model.train()(pixels))
    assert not list(model.buffers())


def test_beginning():
    model = Discriminator().requires_grad_(False)
    weights = torch.cat([layer.weight.flatten() for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)])
    assert float(weights.std()) == pytest.approx(0.02, rel=0.01)
    assert abs(float(weights.mean())) < 1e-4
    assert all(not parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))


def test_channels_last():
    model, strides = Discriminator(8), []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, args, out: strides.append(args[0].stride(1)))
    model(torch.rand(2, 3, 32, 32))
    assert set(strides) == {1}


def test_widths_that_no_32_groups_divide():
    assert Discriminator(width=5, num_layers=2, norm_groups=4)(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 2, 2)


def test_too_small():
    with pytest.raises(LatentDiffError, match="at least 24 pixels"):
        Discriminator(8)(torch.zeros(1, 3, 16, 64))


def test_hinge():
    # max(0, 1 - x): 3, 1.5, 0.5, 0; max(0, 1 + x): 0, 0.5, 1.5, 4
    assert float(discriminator_loss(LOGITS, LOGITS)) == pytest.approx(0.5 * (5 / 4 + 6 / 4))
    assert float(generator_loss(LOGITS)) == pytest.approx(-0.25)


def test_nonsaturating():
    probabilities = LOGITS.double().sigmoid()
    expected = -0.5 * (probabilities.log().mean() + (1 - probabilities).log().mean())
    assert float(discriminator_loss(LOGITS, LOGITS, "nonsaturating")) == pytest.approx(float(expected), rel=1e-6)
    assert float(discriminator_loss(torch.zeros(3), torch.zeros(3), "nonsaturating")) == pytest.approx(math.log(2))
    assert float(generator_loss(LOGITS, "nonsaturating")) == pytest.approx(-float(probabilities.log().mean()), rel=1e-6)


@pytest.mark.parametrize("kind", ["hinge", "nonsaturating"])
def test_the_players_pull_apart(kind):
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    discriminator_loss(real, fake, kind).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    fake.grad = None
    generator_loss(fake, kind).backward()
    assert (fake.grad < 0).all()


def test_unknown_kind():
    with pytest.raises(LatentDiffError, match="did you mean 'hinge'"):
        discriminator_loss(LOGITS, LOGITS, "hinged")
    with pytest.raises(LatentDiffError, match="unknown adversarial loss"):
        generator_loss(LOGITS, "wgan")
