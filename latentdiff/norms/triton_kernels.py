"""The passes over all values as Triton kernels, for NVIDIA GPUs; the same functions as in `torch_kernels`.

A program takes a tile of pixels by channels, whose rows are contiguous in memory. No atomic operations: the sums over
the tiles are added up in a fixed order, so results repeat bit for bit.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values in a tile
MAX_WIDTH = 128  # channels of a tile, a power of two


@triton.jit
def _tile(num_pixels, width, PIXELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return offsets of a tile's values in (B, N, C), and of its channels in (B, C) and (B, tiles, C); masks."""
    block, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)  # only the first axis of a grid can be long
    rows = block * PIXELS + tl.arange(0, PIXELS)
    columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    values = (picture * num_pixels + rows)[:, None] * width + columns[None, :]
    mask = (rows < num_pixels)[:, None] & inside[None, :]
    return values, mask, picture * width + columns, (picture * tl.num_programs(0) + block) * width + columns, inside


@triton.jit
def _dz(x, dy, center, scale, bias, columns, channels, values, mask, inside, SILU: tl.constexpr):
    """Return the gradient before the activation, and x - center."""
    centered = tl.load(x + values, mask, 0.0).to(tl.float32) - tl.load(center + channels, inside, 0.0)[None, :]
    dz = tl.load(dy + values, mask, 0.0).to(tl.float32)
    if SILU:
        factor = tl.load(scale + channels, inside, 0.0)[None, :]
        z = centered * factor + tl.load(bias + columns, inside, 0.0)[None, :]
        gate = tl.sigmoid(z)
        dz = dz * gate * (1 + z * (1 - gate))
    return tl.where(mask, dz, 0.0), centered


@triton.jit
def _moments(x, means, squares, num_pixels, width, PIXELS: tl.constexpr, WIDTH: tl.constexpr):
    values, mask, _, partial, inside = _tile(num_pixels, width, PIXELS, WIDTH)
    numbers = tl.load(x + values, mask, 0.0).to(tl.float32)
    mean = tl.sum(numbers, 0) / tl.minimum(PIXELS, num_pixels - tl.program_id(0) * PIXELS)
    centered = tl.where(mask, numbers - mean[None, :], 0.0)
    tl.store(means + partial, mean, inside)
    tl.store(squares + partial, tl.sum(centered * centered, 0), inside)


@triton.jit
def _normalize(
    x, center, scale, bias, y, num_pixels, width, SILU: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    values, mask, channels, _, inside = _tile(num_pixels, width, PIXELS, WIDTH)
    columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    z = tl.load(x + values, mask, 0.0).to(tl.float32) - tl.load(center + channels, inside, 0.0)[None, :]
    z = z * tl.load(scale + channels, inside, 0.0)[None, :] + tl.load(bias + columns, inside, 0.0)[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + values, z.to(y.dtype.element_ty), mask)


@triton.jit
def _sums(
    x, dy, center, scale, bias, total, products, num_pixels, width,
    SILU: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    values, mask, channels, partial, inside = _tile(num_pixels, width, PIXELS, WIDTH)
    columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    dz, centered = _dz(x, dy, center, scale, bias, columns, channels, values, mask, inside, SILU)
    tl.store(total + partial, tl.sum(dz, 0), inside)
    tl.store(products + partial, tl.sum(dz * centered, 0), inside)


@triton.jit
def _gradient(
    x, dy, center, scale, bias, p, q, dx, num_pixels, width,
    SILU: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    values, mask, channels, _, inside = _tile(num_pixels, width, PIXELS, WIDTH)
    columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    dz, centered = _dz(x, dy, center, scale, bias, columns, channels, values, mask, inside, SILU)
    result = dz * tl.load(scale + channels, inside, 0.0)[None, :] + tl.load(q + channels, inside, 0.0)[None, :]
    result += centered * tl.load(p + channels, inside, 0.0)[None, :]
    tl.store(dx + values, result.to(dx.dtype.element_ty), mask)


def parts(x: Tensor) -> Iterator[slice]:
    """Yield the pictures to take at a time: all of them."""
    yield slice(None)


def load(x: Tensor) -> Tensor:
    """Return the values in the form that the other functions take: as they are."""
    return x


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the pixels, those of the tiles combined (Chan et al. 1979)."""
    grid, sizes = _grid(x)
    means, squares = _partial_sums(x, grid), _partial_sums(x, grid)
    _moments[grid](x, means, squares, *x.shape[1:], **sizes)
    num_pixels, tile = x.shape[1], sizes["PIXELS"]
    counts = torch.full((grid[0], 1), float(tile), device=x.device)
    counts[-1] = num_pixels - (grid[0] - 1) * tile
    mean = (means * counts).sum(1) / num_pixels
    return mean, (squares + counts * (means - mean[:, None]).square()).sum(1) / num_pixels


def normalize(x: Tensor, center: Tensor, scale: Tensor, bias: Tensor, silu: bool, *, out: Tensor) -> None:
    """Write act((x - center) scale + bias)."""
    grid, sizes = _grid(x)
    _normalize[grid](x, center, scale, bias, out, *x.shape[1:], SILU=silu, **sizes)


def sums(x: Tensor, dy: Tensor, center: Tensor, scale: Tensor, bias: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Return the sums of dz and of dz (x - center) over the pixels."""
    grid, sizes = _grid(x)
    total, products = _partial_sums(x, grid), _partial_sums(x, grid)
    _sums[grid](x, dy, center, scale, bias, total, products, *x.shape[1:], SILU=silu, **sizes)
    return total.sum(1), products.sum(1)


def gradient(
    x: Tensor, dy: Tensor, center: Tensor, scale: Tensor, bias: Tensor, silu: bool, p: Tensor, q: Tensor, *, out: Tensor
) -> None:
    """Write dz scale + (x - center) p + q."""
    grid, sizes = _grid(x)
    _gradient[grid](x, dy, center, scale, bias, p, q, out, *x.shape[1:], SILU=silu, **sizes)


def _grid(x: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    batch, num_pixels, width = x.shape
    tile = min(MAX_WIDTH, triton.next_power_of_2(width))
    sizes = {"PIXELS": TILE // tile, "WIDTH": tile}
    return (triton.cdiv(num_pixels, sizes["PIXELS"]), batch, triton.cdiv(width, tile)), sizes


def _partial_sums(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return torch.empty(len(x), grid[0], x.shape[2], device=x.device)
