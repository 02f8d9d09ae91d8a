"""One figure: draws of each family, walks between two codes, and held-out pictures rebuilt."""

from typing import Any

import torch
from pictures import SIZE, Pictures
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ZOOM, GAP, LABEL, WALK, COUNT = 3, 4, 224, 8, 16
NEW = {"autoregressive": "value by value", "VAE": "decoder's means", "GAN": "generator",
       "diffusion": "250 steps"}  # fmt: skip


def walk(model: Any, seed: int) -> Tensor:
    """Decode eight codes on the arc between two, all as long as codes are."""
    generator = torch.Generator().manual_seed(seed)
    first, last = model.new_code(2, generator)
    angle = torch.linspace(0, torch.pi / 2, WALK).view(-1, *[1] * first.dim())
    return model.from_code(angle.cos() * first + angle.sin() * last)  # independent codes are nearly orthogonal


@torch.no_grad()
def draw_figure(models: dict[str, Any], pictures: Pictures, seed: int) -> Image.Image:
    """Return the figure; GAN and autoregressive model cannot rebuild a picture, the latter has no code to walk."""
    rows: list[tuple[str, Tensor]] = [("real", pictures.train[:: len(pictures.train) // COUNT][:COUNT])]
    for name, model in models.items():
        rows.append((f"{name}: {NEW[name]}", model.draw(COUNT, torch.Generator().manual_seed(seed))))
    for name, model in models.items():
        if hasattr(model, "new_code"):
            rows.append((f"{name}: two walks", torch.cat([walk(model, seed), walk(model, seed + 1)])))
    chosen = pictures.held_out[:COUNT]
    rows.append(("held out", chosen))
    for name, model in models.items():
        if hasattr(model, "to_code"):
            rows.append((f"{name}: rebuilt from its code", model.from_code(model.to_code(chosen))))
        if hasattr(model, "rebuild"):
            generator = torch.Generator().manual_seed(seed)
            rows.append((f"{name}: rebuilt from half noise", model.rebuild(chosen, generator)))
    side = SIZE * ZOOM
    sheet = Image.new("RGB", (LABEL + COUNT * (side + GAP), len(rows) * (side + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (label, levels) in enumerate(rows):
        top = GAP + row * (side + GAP)
        pen.text((6, top + side // 2 - 8), label, fill="black", font=font)
        for column, each in enumerate(levels):
            picture = Image.fromarray(each.permute(1, 2, 0).byte().numpy())
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (LABEL + column * (side + GAP), top))
    return sheet
