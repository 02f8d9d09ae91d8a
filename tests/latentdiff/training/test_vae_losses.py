"""The VAE losses: closed forms, gradients, and LPIPS against a reference in torch.nn.functional."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from latentdiff.errors import LatentDiffError
from latentdiff.training.perceptual import PerceptualLoss
from latentdiff.training.vae_losses import StructuralLoss, adaptive_weight, load_perceptual, reconstruction_nll


def picture(count: int = 2, size: int = 64) -> torch.Tensor:
    """Smooth colors with edges, in [-1, 1]."""
    colours = F.interpolate(torch.rand(count, 3, 8, 8) * 2 - 1, size=(size, size), mode="bilinear")
    return (2.0 * colours).clamp(-1, 1)


# --- reconstruction ---


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_nll(kind):
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    found = reconstruction_nll(x, y, torch.tensor(0.7), kind)
    if kind == "l1":
        reference = torch.distributions.Laplace(y, math.exp(0.7)).log_prob(x) + math.log(2)
    else:
        reference = 2 * torch.distributions.Normal(y, math.exp(0.35)).log_prob(x) + math.log(2 * math.pi)
    torch.testing.assert_close(found, -reference.flatten(1).sum(1))


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_the_best_variance_is_the_mean_error(kind):
    x, y = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    error = (x - y).abs() if kind == "l1" else (x - y).square()
    log_variance = error.mean().log().requires_grad_()
    reconstruction_nll(x, y, log_variance, kind).mean().backward()
    assert abs(float(log_variance.grad)) < 1e-3  # of 192 values


def test_perceptual_counts_with_every_value():
    """LDM adds it to the error of every value before dividing by the variance."""
    x, y, perceptual = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.5, 2.0])
    errors = (x - y).abs() + perceptual[:, None, None, None]
    expected = (errors / math.exp(0.7) + 0.7).flatten(1).sum(1)
    torch.testing.assert_close(reconstruction_nll(x, y, torch.tensor(0.7), perceptual=perceptual), expected)


def test_low_precision_is_summed_in_float32():
    found = reconstruction_nll(
        torch.ones(1, 3, 64, 64).bfloat16(), torch.zeros(1, 3, 64, 64).bfloat16(), torch.zeros(())
    )
    assert found.dtype == torch.float32
    assert float(found) == 3 * 64 * 64


def test_wrong_reconstruction():
    with pytest.raises(LatentDiffError, match="unknown reconstruction loss 'huber'"):
        reconstruction_nll(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(()), "huber")
    with pytest.raises(LatentDiffError, match="reconstruction"):
        reconstruction_nll(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5), torch.zeros(()))


# --- adaptive weight ---


def test_adaptive_weight():
    """With it, both losses have gradients of the same norm in the last layer."""
    last, x = torch.nn.Conv2d(4, 3, 3, padding=1), torch.randn(2, 4, 8, 8)
    target = torch.randn(2, 3, 8, 8)
    (reconstruction,) = torch.autograd.grad((last(x) - target).abs().mean(), last.weight)
    (generator,) = torch.autograd.grad(-0.1 * last(x).square().mean(), last.weight)
    weight = adaptive_weight(reconstruction.requires_grad_(), generator)
    assert float(weight) == pytest.approx(float(reconstruction.detach().norm() / (generator.norm() + 1e-4)))
    (both,) = torch.autograd.grad(-0.1 * weight * last(x).square().mean(), last.weight)
    assert float(both.norm()) == pytest.approx(float(reconstruction.detach().norm()), rel=1e-2)
    assert weight.shape == ()
    assert not weight.requires_grad


def test_adaptive_weight_is_limited():
    assert float(adaptive_weight(torch.ones(9), torch.zeros(9), limit=50.0)) == 50.0
    assert float(adaptive_weight(torch.full((9,), 1e9), torch.zeros(9))) == 1e4
    assert float(adaptive_weight(torch.zeros(9), torch.zeros(9))) == 0.0


def test_adaptive_weight_asks_the_device_for_nothing():
    """A meta tensor has no values: reading one raises."""
    assert adaptive_weight(torch.ones(9, device="meta"), torch.ones(9, device="meta")).shape == ()


# --- structural loss ---


def shifted(x, pixels):
    return x.roll(pixels, dims=3)


def blurred(x, window):
    return F.avg_pool2d(F.pad(x, [window // 2] * 4, mode="replicate"), window, stride=1)


def ssim_of_boxes(x: np.ndarray, y: np.ndarray) -> float:
    """Mean SSIM of one channel on [0, 1] over 7 x 7 windows, computed with scipy."""

    def blur(image: np.ndarray) -> np.ndarray:
        return scipy.ndimage.uniform_filter(image, 7)[3:-3, 3:-3]

    a, b = blur(x), blur(y)
    numerator = (2 * a * b + 1e-4) * (2 * (blur(x * y) - a * b) + 9e-4)
    return float((numerator / ((a**2 + b**2 + 1e-4) * (blur(x**2) - a**2 + blur(y**2) - b**2 + 9e-4))).mean())


@pytest.mark.parametrize(("size", "num_scales"), [(13, 1), (14, 2), (64, 4), (224, 5)])
def test_structural_loss_is_its_definition(size, num_scales):
    """1 - SSIM of the pictures at full, half, quarter, ... size while a window fits, on five scales at most."""
    x, y = picture(1, size).double(), torch.randn(1, 3, size, size, dtype=torch.float64)
    losses = []
    for scale in range(num_scales):
        a, b = (F.avg_pool2d((image + 1) / 2, 2**scale)[0].numpy() for image in (x, y))
        losses.append(1 - np.mean([ssim_of_boxes(a[c], b[c]) for c in range(3)]))
    assert StructuralLoss()(x, y).item() == pytest.approx(np.mean(losses), rel=1e-9)


@pytest.mark.parametrize("size", [7, 13, 32, 64, 256, 512])
def test_equal_pictures(size):
    x = picture(2, size)
    loss = StructuralLoss()(x, x)
    assert loss.shape == (2,)
    assert float(loss.abs().max()) < 1e-5


@pytest.mark.parametrize("size", [32, 64, 128])
def test_grows_with_blur_shift_and_noise(size):
    x, noise = picture(4, size), torch.randn(4, 3, size, size)
    unit = size // 32
    for damage in (
        lambda strength: blurred(x, 2 * strength * unit + 1),
        lambda strength: shifted(x, strength * unit),
        lambda strength: x + 0.1 * strength * noise,
        lambda strength: x * (1 - 0.2 * strength),
    ):
        losses = torch.stack([StructuralLoss()(x, damage(strength)) for strength in range(4)])
        assert (losses.diff(dim=0) > 0).all()
        assert float(losses.max()) < 1.5


def test_gradient():
    """Finite for random, equal, constant and inverted pictures; correct by finite differences."""
    x = picture()
    for y in (torch.randn_like(x), x.clone(), torch.zeros_like(x), -x, 100 * torch.randn_like(x)):
        y.requires_grad_()
        StructuralLoss()(x, y).sum().backward()
        assert y.grad.isfinite().all()
    pair = [torch.rand(1, 1, 14, 15, dtype=torch.float64) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda y: StructuralLoss()(pair[0], y), pair[1].requires_grad_())


def test_following_the_gradient_mends_the_picture():
    x = picture()
    y = blurred(x, 5).requires_grad_()
    optimizer = torch.optim.Adam([y], lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = StructuralLoss()(x, y).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_autocast_leaves_it_alone():
    x, y = picture(), picture()
    expected = StructuralLoss()(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(StructuralLoss()(x, y), expected)
    assert StructuralLoss()(x, y.bfloat16()).dtype == torch.float32


def test_smaller_than_a_window():
    with pytest.raises(LatentDiffError, match="needs at least 7"):
        StructuralLoss()(torch.zeros(1, 3, 6, 64), torch.zeros(1, 3, 6, 64))


# --- LPIPS ---

SHAPES = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256)}
SHAPES |= {17: (512, 256)} | dict.fromkeys((19, 21, 24, 26, 28), (512, 512))


@pytest.fixture(scope="module")
def vgg() -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names, scaled so that the activations do not vanish."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (out, into) in SHAPES.items():
        tensors[f"features.{i}.weight"] = torch.randn(out, into, 3, 3, generator=generator) * (2 / (9 * into)) ** 0.5
        tensors[f"features.{i}.bias"] = torch.randn(out, generator=generator) * 0.1
    return tensors | {"classifier.6.bias": torch.zeros(1000)}


@pytest.fixture(scope="module")
def lins() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    widths = (64, 128, 256, 512, 512)
    return {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for k, width in enumerate(widths)}


@pytest.fixture(scope="module")
def weights(vgg, lins, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    save_file(vgg, folder / "vgg16.safetensors")
    save_file({name: tensor.half() for name, tensor in lins.items()}, folder / "lpips.safetensors")
    return folder


def reference_lpips(x, y, vgg, lins):
    """The definition (arXiv 1801.03924, equation 1), one convolution at a time."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    maps = [((image + 1) / 2 - mean) / std for image in (x, y)]
    total, k = 0.0, 0
    for i in SHAPES:
        if i in (5, 10, 17, 24):
            maps = [F.max_pool2d(z, 2, 2) for z in maps]
        maps = [F.relu(F.conv2d(z, vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"], padding=1)) for z in maps]
        if i in (2, 7, 14, 21, 28):
            a, b = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in maps)
            total = total + F.conv2d((a - b).square(), lins[f"lin{k}.model.1.weight"]).mean((1, 2, 3))
            k += 1
    return total


def test_lpips_is_its_definition(weights, vgg, lins):
    model, sentence = load_perceptual(str(weights))
    assert isinstance(model, PerceptualLoss)
    assert sentence == f"Perceptual loss: LPIPS (VGG16) with weights from {weights}."
    x, y = picture(2, 32), picture(2, 32)
    expected = reference_lpips(x, y, vgg, {name: tensor.half().float() for name, tensor in lins.items()})
    found = model(x, y)
    assert found.shape == (2,)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)  # lpips rounds the mean and std of the colors
    assert not model(x, x).any()


def test_lpips_gradient(weights):
    model = PerceptualLoss.from_pretrained(weights)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    x = picture(2, 16)
    for y in (picture(2, 16), x.clone(), torch.full_like(x, -1.0)):
        y.requires_grad_()
        model(x, y).sum().backward()
        assert y.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x, y).dtype == torch.float32


def test_lpips_of_one_file(vgg, lins, tmp_path):
    save_file(vgg | lins, tmp_path / "all.safetensors")
    assert isinstance(load_perceptual(str(tmp_path / "all.safetensors"))[0], PerceptualLoss)


def test_no_weights_named():
    model, sentence = load_perceptual(None)
    assert isinstance(model, StructuralLoss)
    assert "no LPIPS weights are given" in sentence


def test_weights_that_cannot_be_used(vgg, lins, tmp_path):
    def check(message):
        with pytest.raises(LatentDiffError, match=message):
            load_perceptual(str(tmp_path))

    check("contains no .safetensors file")
    with pytest.raises(LatentDiffError, match="no such file"):
        load_perceptual(str(tmp_path / "lpips.safetensors"))
    (tmp_path / "vgg.pth").write_bytes(b"pickle")
    with pytest.raises(LatentDiffError, match="never opened"):
        load_perceptual(str(tmp_path / "vgg.pth"))
    save_file(lins, tmp_path / "a.safetensors")
    check("lacks 26 tensors: features.0.bias")
    save_file({"features.0.bias": torch.zeros(65)}, tmp_path / "b.safetensors")
    check(r"features.0.bias has shape \[65\]; the config says \[64\]")
    save_file({"features.0.bias": torch.zeros(64, dtype=torch.int32)}, tmp_path / "b.safetensors")
    check("features.0.bias is I32")
    (tmp_path / "b.safetensors").write_bytes(b"not a file of tensors")
    check("damaged")


def test_lpips_of_wrong_pictures():
    with pytest.raises(LatentDiffError, match="at least 16 a side"):
        PerceptualLoss()(torch.zeros(1, 3, 8, 64), torch.zeros(1, 3, 8, 64))
