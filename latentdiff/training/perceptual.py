"""LPIPS (Zhang et al., arXiv 1801.03924) on VGG16, with weights from safetensors files."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.diffusion.schedule import at_least_float32
from latentdiff.errors import LatentDiffError, raise_for_tensors
from latentdiff.files.tensors import Stored, check_tensors, open_tensors

# VGG16 (arXiv 1409.1556): five stages of 3x3 convolutions, with 2x2 max pooling between them. The numbers are from
# torchvision's names for the convolutions: `features.0`, `features.2`, ...
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
MIN_SIZE = 16  # four poolings leave one pixel
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet mean and std, rounded as in lpips
NORM_EPS = 1e-10


class PerceptualLoss(nn.Module):
    """LPIPS 0.1 with VGG16: a weighted distance between the features of two images; all parameters are frozen."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        in_width = 3
        for stage, width in zip(STAGES, WIDTHS, strict=True):
            for number in stage:
                self.features[str(number)] = nn.Conv2d(in_width, width, 3, padding=1)
                in_width = width
        self.lins = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
        """Map two batches (B, 3, H, W) in [-1, 1] to (B,): 0 for equal images, about 1 for unrelated ones."""
        if pixels.shape[1] != 3 or min(pixels.shape[2:]) < MIN_SIZE:
            raise LatentDiffError(
                f"pixels have shape {tuple(pixels.shape)}; LPIPS expects (B, 3, H, W), at least {MIN_SIZE} a side"
            )
        distances = []
        for lin, x, y in zip(self.lins, self._features(pixels), self._features(reconstruction), strict=True):
            distances.append((lin * (x - y).square()).sum(1).mean((1, 2)))
        return torch.stack(distances).sum(0)

    def _features(self, pixels: Tensor) -> list[Tensor]:
        """The last feature map of each stage, (B, width, h, w), normalized to unit length at each position."""
        x = (pixels.to(memory_format=torch.channels_last) - self.shift) / self.scale
        maps: list[Tensor] = []
        for stage in STAGES:
            if maps:
                x = F.max_pool2d(x, 2)
            for number in stage:
                x = F.relu(self.features[str(number)](x))
            maps.append(x)
        return [F.normalize(at_least_float32(x), dim=1, eps=NORM_EPS) for x in maps]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> PerceptualLoss:
        """Load the weights from a safetensors file, or from all such files in a folder.

        Expected tensors, of any floating-point dtype; others, such as VGG16's classifier, are ignored:
            `features.{i}.weight` (out, in, 3, 3), `features.{i}.bias` (out,): torchvision's VGG16, trained on ImageNet,
                i = 0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28; inputs normalized as in torchvision.
            `lin{k}.model.1.weight` (1, width, 1, 1): the linear layers of the lpips package (weights/v0.1/vgg.pth),
                k = 0 ... 4, width = 64, 128, 256, 512, 512.
        Both are published as pickled .pth files, which are never opened here: re-save them as safetensors.

        Raises:
            LatentDiffError: a file is missing or damaged, or a tensor is missing, misshapen or not floating-point.
        """
        model, path = cls(), Path(path)
        found: dict[str, Stored] = {}
        expected = {_name_in_file(name): list(tensor.shape) for name, tensor in model.state_dict().items()}
        for file in _weight_files(path):
            here = {name: tensor for name, tensor in open_tensors(file).items() if name in expected}
            check_tensors(file, here, {name: [expected[name]] for name in here}, "LPIPS")
            found |= here
        raise_for_tensors(path, "lacks", expected.keys() - found.keys())
        model.load_state_dict({name: found[_name_in_file(name)].read(torch.float32) for name in model.state_dict()})
        return model


def _name_in_file(name: str) -> str:
    """Map `lins.0` to `lin0.model.1.weight`, its name in lpips; `features.*` keep torchvision's names."""
    return name.replace("lins.", "lin") + ".model.1.weight" if name.startswith("lins.") else name


def _weight_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise LatentDiffError(f"{path}: {'contains no .safetensors file' if path.is_dir() else 'no such file'}")
    if files[0].suffix != ".safetensors":
        raise LatentDiffError(f"{path}: expected a .safetensors file; pickled weights are never opened")
    return files
