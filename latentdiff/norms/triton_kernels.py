"""The work of a GroupNorm as Triton kernels, for NVIDIA GPUs; the same functions as in `torch_kernels`.

A program takes a tile of pixels by channels, whose rows are contiguous in memory, or one group of one picture, for
which it adds up what the tiles found. No atomic operations: sums have a fixed order, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values in a tile
MAX_WIDTH = 128  # channels of a tile, a power of two
ROWS = 32  # tiles added up at a time
PROGRAMS = 1024  # that take LayerNorm's gradients, at most


@triton.jit
def _tile(num_pixels, width, PIXELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a tile's offsets in (B, N, C), (B, C), (B, tiles, C) and (C), and masks of its values and channels."""
    block, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)  # only the first axis of a grid can be long
    rows = block * PIXELS + tl.arange(0, PIXELS)
    columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    values = (picture * num_pixels + rows)[:, None] * width + columns[None, :]
    mask = (rows < num_pixels)[:, None] & inside[None, :]
    partial = (picture * tl.num_programs(0) + block) * width + columns
    return values, picture * width + columns, partial, columns, mask, inside


@triton.jit
def _standardized(x, center, spread, values, channels, mask, inside):
    """Return (x - center) spread."""
    centered = tl.load(x + values, mask, 0.0).to(tl.float32) - tl.load(center + channels, inside, 0.0)[None, :]
    return centered * tl.load(spread + channels, inside, 0.0)[None, :]


@triton.jit
def _dz(dy, normal, weight, bias, values, columns, mask, inside, SILU: tl.constexpr):
    """Return the gradient before the activation."""
    dz = tl.load(dy + values, mask, 0.0).to(tl.float32)
    if SILU:
        z = normal * tl.load(weight + columns, inside, 0.0)[None, :] + tl.load(bias + columns, inside, 0.0)[None, :]
        gate = tl.sigmoid(z)
        dz = dz * gate * (1 + z * (1 - gate))
    return dz


@triton.jit
def _moments(x, means, squares, num_pixels, width, PIXELS: tl.constexpr, WIDTH: tl.constexpr):
    """Write the mean over a tile's pixels, and the sum of squared distances from it, (B, tiles, C)."""
    values, _, partial, _, mask, inside = _tile(num_pixels, width, PIXELS, WIDTH)
    numbers = tl.load(x + values, mask, 0.0).to(tl.float32)
    mean = tl.sum(numbers, 0) / tl.minimum(PIXELS, num_pixels - tl.program_id(0) * PIXELS)
    centered = tl.where(mask, numbers - mean[None, :], 0.0)
    tl.store(means + partial, mean, inside)
    tl.store(squares + partial, tl.sum(centered * centered, 0), inside)


@triton.jit
def _combine(
    means, squares, center, spread, num_pixels, width, share, tiles, eps,
    PIXELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Combine the tiles' moments (Chan et al. 1979) to a group's mean and reciprocal deviation, (B, C)."""
    picture, offsets = tl.program_id(1).to(tl.int64), tl.arange(0, PADDED)
    inside, columns = offsets < share, tl.program_id(0) * share + offsets
    rows = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, PADDED], tl.float32)
    for first in range(0, tiles, ROWS):
        mask = (first + rows < tiles)[:, None] & inside[None, :]
        counts = tl.minimum(PIXELS, num_pixels - (first + rows) * PIXELS).to(tl.float32)
        entries = (picture * tiles + first + rows)[:, None] * width + columns[None, :]
        total += tl.load(means + entries, mask, 0.0) * counts[:, None]
    mean = tl.sum(tl.sum(total, 1), 0) / (num_pixels * share)
    total = tl.zeros([ROWS, PADDED], tl.float32)
    for first in range(0, tiles, ROWS):
        mask = (first + rows < tiles)[:, None] & inside[None, :]
        counts = tl.minimum(PIXELS, num_pixels - (first + rows) * PIXELS).to(tl.float32)
        entries = (picture * tiles + first + rows)[:, None] * width + columns[None, :]
        distance = tl.load(means + entries, mask, 0.0) - mean
        total += tl.where(mask, tl.load(squares + entries, mask, 0.0) + counts[:, None] * distance * distance, 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / (num_pixels * share)
    zero = tl.zeros([PADDED], tl.float32)
    tl.store(center + picture * width + columns, zero + mean, inside)
    tl.store(spread + picture * width + columns, zero + 1 / tl.sqrt(variance + eps), inside)


@triton.jit
def _normalize(
    x, center, spread, weight, bias, y, num_pixels, width,
    SILU: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    values, channels, _, columns, mask, inside = _tile(num_pixels, width, PIXELS, WIDTH)
    z = _standardized(x, center, spread, values, channels, mask, inside)
    z = z * tl.load(weight + columns, inside, 0.0)[None, :] + tl.load(bias + columns, inside, 0.0)[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + values, z.to(y.dtype.element_ty), mask)


@triton.jit
def _sums(
    x, dy, center, spread, weight, bias, total, products, num_pixels, width,
    SILU: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write a tile's sums of dz and dz (x - center) spread, (B, tiles, C)."""
    values, channels, partial, columns, mask, inside = _tile(num_pixels, width, PIXELS, WIDTH)
    normal = _standardized(x, center, spread, values, channels, mask, inside)
    dz = _dz(dy, normal, weight, bias, values, columns, mask, inside, SILU)
    tl.store(total + partial, tl.sum(dz, 0), inside)
    tl.store(products + partial, tl.sum(dz * normal, 0), inside)


@triton.jit
def _combine_sums(
    total, products, weight, dbias, dweight, p, q, num_pixels, width, share, tiles,
    PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add up the tiles' sums, (B, C), and average them over the group, weighted, (B, C)."""
    picture, offsets = tl.program_id(1).to(tl.int64), tl.arange(0, PADDED)
    inside, columns = offsets < share, tl.program_id(0) * share + offsets
    rows = tl.arange(0, ROWS)
    one, other = tl.zeros([ROWS, PADDED], tl.float32), tl.zeros([ROWS, PADDED], tl.float32)
    for first in range(0, tiles, ROWS):
        mask = (first + rows < tiles)[:, None] & inside[None, :]
        entries = (picture * tiles + first + rows)[:, None] * width + columns[None, :]
        one += tl.load(total + entries, mask, 0.0)
        other += tl.load(products + entries, mask, 0.0)
    sums, normals, factor = tl.sum(one, 0), tl.sum(other, 0), tl.load(weight + columns, inside, 0.0)
    channels, zero = picture * width + columns, tl.zeros([PADDED], tl.float32)
    tl.store(dbias + channels, sums, inside)
    tl.store(dweight + channels, normals, inside)
    tl.store(p + channels, zero + tl.sum(normals * factor, 0) / (num_pixels * share), inside)
    tl.store(q + channels, zero + tl.sum(sums * factor, 0) / (num_pixels * share), inside)


@triton.jit
def _gradient(
    x, dy, center, spread, weight, bias, p, q, dx, num_pixels, width,
    SILU: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    values, channels, _, columns, mask, inside = _tile(num_pixels, width, PIXELS, WIDTH)
    normal = _standardized(x, center, spread, values, channels, mask, inside)
    dz = _dz(dy, normal, weight, bias, values, columns, mask, inside, SILU)
    result = dz * tl.load(weight + columns, inside, 0.0)[None, :] - tl.load(q + channels, inside, 0.0)[None, :]
    result -= normal * tl.load(p + channels, inside, 0.0)[None, :]
    result = result * tl.load(spread + channels, inside, 0.0)[None, :]
    tl.store(dx + values, result.to(dx.dtype.element_ty), mask)


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write act(z); return the mean and the reciprocal standard deviation of each channel's group, (B, C)."""
    grid, sizes, by_group, padded = _grids(x, groups)
    means, squares = (x.new_empty(len(x), grid[0], x.shape[2], dtype=torch.float32) for _ in range(2))
    center, spread = (x.new_empty(len(x), x.shape[2], dtype=torch.float32) for _ in range(2))
    _moments[grid](x, means, squares, *x.shape[1:], **sizes)
    _combine[by_group](means, squares, center, spread, *x.shape[1:], x.shape[2] // groups, grid[0], eps,
                       PIXELS=sizes["PIXELS"], **padded)  # fmt: skip
    _normalize[grid](x, center, spread, weight, bias, out, *x.shape[1:], SILU=silu, **sizes)
    return center, spread


def gradients(
    x: Tensor, dy: Tensor, center: Tensor, spread: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, *,
    out: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write dx; return the gradients of weight and bias, (C)."""
    grid, sizes, by_group, padded = _grids(x, groups)
    total, products = (x.new_empty(len(x), grid[0], x.shape[2], dtype=torch.float32) for _ in range(2))
    dweight, dbias, p, q = results = x.new_empty(4, len(x), x.shape[2], dtype=torch.float32)
    _sums[grid](x, dy, center, spread, weight, bias, total, products, *x.shape[1:], SILU=silu, **sizes)
    _combine_sums[by_group](total, products, weight, dbias, dweight, p, q, *x.shape[1:], x.shape[2] // groups, grid[0],
                            **padded)  # fmt: skip
    _gradient[grid](x, dy, center, spread, weight, bias, p, q, out, *x.shape[1:], SILU=silu, **sizes)
    dweight, dbias = results[:2].sum(1)
    return dweight, dbias


def _grids(x: Tensor, groups: int) -> tuple[tuple[int, int, int], dict[str, int], tuple[int, int], dict[str, int]]:
    """Return the grid of tiles and their sizes, the grid of groups and theirs."""
    batch, num_pixels, width = x.shape
    tile = min(MAX_WIDTH, triton.next_power_of_2(width))
    sizes = {"PIXELS": TILE // tile, "WIDTH": tile}
    padded = {"PADDED": triton.next_power_of_2(width // groups), "ROWS": ROWS}
    return (triton.cdiv(num_pixels, sizes["PIXELS"]), batch, triton.cdiv(width, tile)), sizes, (groups, batch), padded


# --- LayerNorm: x is (N, C), and a program takes whole rows ---


@triton.jit
def _layer_norm(
    x, weight, bias, y, means, spreads, count, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    exists, inside = rows < count, columns < width
    mask = exists[:, None] & inside[None, :]
    values = rows.to(tl.int64)[:, None] * width + columns[None, :]
    numbers = tl.load(x + values, mask, 0.0).to(tl.float32)
    mean = tl.sum(numbers, 1) / width
    centered = tl.where(mask, numbers - mean[:, None], 0.0)
    spread = 1 / tl.sqrt(tl.sum(centered * centered, 1) / width + eps)
    z = centered * spread[:, None] * tl.load(weight + columns, inside, 0.0)[None, :]
    tl.store(y + values, (z + tl.load(bias + columns, inside, 0.0)[None, :]).to(y.dtype.element_ty), mask)
    tl.store(means + rows, mean, exists)
    tl.store(spreads + rows, spread, exists)


@triton.jit
def _layer_norm_gradients(
    x, dy, weight, means, spreads, dx, dweight, dbias, count, width, blocks, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    factor = tl.load(weight + columns, inside, 0.0)[None, :]
    normals, sums = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for block in range(tl.program_id(0) * blocks, (tl.program_id(0) + 1) * blocks):
        rows = block * ROWS + tl.arange(0, ROWS)
        exists = rows < count
        mask = exists[:, None] & inside[None, :]
        values = rows.to(tl.int64)[:, None] * width + columns[None, :]
        spread = tl.load(spreads + rows, exists, 0.0)[:, None]
        normal = (tl.load(x + values, mask, 0.0).to(tl.float32) - tl.load(means + rows, exists, 0.0)[:, None]) * spread
        normal = tl.where(mask, normal, 0.0)
        gradient = tl.load(dy + values, mask, 0.0).to(tl.float32)
        normals += tl.sum(gradient * normal, 0)
        sums += tl.sum(gradient, 0)
        gradient = gradient * factor
        along, level = tl.sum(gradient * normal, 1) / width, tl.sum(gradient, 1) / width
        result = (gradient - normal * along[:, None] - level[:, None]) * spread
        tl.store(dx + values, result.to(dx.dtype.element_ty), mask)
    tl.store(dweight + tl.program_id(0) * width + columns, normals, inside)
    tl.store(dbias + tl.program_id(0) * width + columns, sums, inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """Normalize the rows of x (N, C); return their means and reciprocal standard deviations, (N)."""
    sizes, blocks = _rows(x)
    means, spreads = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    _layer_norm[(blocks,)](x, weight, bias, out, means, spreads, *x.shape, eps, **sizes)
    return means, spreads


def layer_norm_gradients(
    x: Tensor, dy: Tensor, means: Tensor, spreads: Tensor, weight: Tensor, *, out: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write dx; return the gradients of weight and bias, (C)."""
    sizes, blocks = _rows(x)
    share = triton.cdiv(blocks, PROGRAMS)
    programs = triton.cdiv(blocks, share)
    partial = x.new_empty(2, programs, x.shape[1], dtype=torch.float32)
    _layer_norm_gradients[(programs,)](x, dy, weight, means, spreads, out, partial[0], partial[1], *x.shape, share,
                                       **sizes)  # fmt: skip
    dweight, dbias = partial.sum(1)
    return dweight, dbias


def _rows(x: Tensor) -> tuple[dict[str, int], int]:
    """Return the size of a block of rows, and how many blocks there are."""
    width = triton.next_power_of_2(x.shape[1])
    rows = max(1, TILE // width)
    return {"ROWS": rows, "WIDTH": width}, triton.cdiv(len(x), rows)
