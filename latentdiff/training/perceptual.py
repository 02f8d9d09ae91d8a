"""`PerceptualLoss`: LPIPS (Zhang et al., arXiv 1801.03924) on VGG16, with weights from safetensors files."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.diffusion.schedule import at_least_float32
from latentdiff.errors import LatentDiffError, complain
from latentdiff.files.tensors import Stored, check_tensors, open_tensors

# VGG16 (arXiv 1409.1556): five stages of 3x3 convolutions, each but the first after a 2x2 maximum pooling. The numbers
# are torchvision's names of the convolutions, `features.0`, `features.2`, ...
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
MIN_SIZE = 16  # four poolings leave one pixel
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # lpips' form of ImageNet's mean and deviation
NORM_EPS = 1e-10


class PerceptualLoss(nn.Module):
    """Distance between the features of two pictures, layer by layer, as LPIPS version 0.1 with VGG16 weighs them.

    The parameters are frozen; `from_pretrained` reads them.
    """

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
        """Two batches (B, 3, H, W) in [-1, 1] to (B,): 0 for equal pictures, about 1 for unrelated ones.

        Raises:
            LatentDiffError: the pictures are not RGB, or smaller than 16 pixels a side.
        """
        if pixels.shape[1] != 3 or min(pixels.shape[2:]) < MIN_SIZE:
            raise LatentDiffError(
                f"pixels have shape {tuple(pixels.shape)}; LPIPS sees (B, 3, H, W) from {MIN_SIZE} up"
            )
        distances = []
        for lin, x, y in zip(self.lins, self._features(pixels), self._features(reconstruction), strict=True):
            distances.append((lin * (x - y).square()).sum(1).mean((1, 2)))
        return torch.stack(distances).sum(0)

    def _features(self, pixels: Tensor) -> list[Tensor]:
        """The last map of each stage, (B, width, h, w), scaled to length 1 at every place."""
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
        """Read a safetensors file, or all those of a folder together.

        Expected, in any floating point dtype; whatever else is there (VGG16's classifier) is left alone:
            `features.{i}.weight` (out, in, 3, 3), `features.{i}.bias` (out,): torchvision's VGG16, trained on ImageNet,
                i = 0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28; pixels as torchvision normalises them.
            `lin{k}.model.1.weight` (1, width, 1, 1): the layers of the package lpips (weights/v0.1/vgg.pth),
                k = 0 ... 4, width = 64, 128, 256, 512, 512.
        Both come as pickled .pth files, which are never opened here: re-save them with `safetensors.torch.save_file`.

        Raises:
            LatentDiffError: no such file, damaged, or a tensor is missing, misshapen or not of floating point.
        """
        model, path = cls(), Path(path)
        found: dict[str, Stored] = {}
        expected = {_name_in_file(name): list(tensor.shape) for name, tensor in model.state_dict().items()}
        for file in _weight_files(path):
            here = {name: tensor for name, tensor in open_tensors(file).items() if name in expected}
            check_tensors(file, here, {name: [expected[name]] for name in here}, "LPIPS")
            found |= here
        complain(path, "lacks", expected.keys() - found.keys())
        model.load_state_dict({name: found[_name_in_file(name)].read(torch.float32) for name in model.state_dict()})
        return model


def _name_in_file(name: str) -> str:
    """`lins.0` -> `lin0.model.1.weight`, its name in the package lpips; `features.*` are torchvision's names."""
    return name.replace("lins.", "lin") + ".model.1.weight" if name.startswith("lins.") else name


def _weight_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise LatentDiffError(f"{path}: {'holds no .safetensors file' if path.is_dir() else 'no such file'}")
    if files[0].suffix != ".safetensors":
        raise LatentDiffError(f"{path}: expected a .safetensors file; pickled weights are never opened")
    return files
