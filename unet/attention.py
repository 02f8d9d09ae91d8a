"""Attention of the UNet: its backends, multi-head attention, and the transformer that follows a ResBlock.

Shapes: B batch, C channels, H W height and width, N = H*W pixels, L tokens, D text feature width, h heads.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.norms import GroupNorm, LayerNorm

from .errors import UNetError
from .trajectory import Trace, TrajectoryAttention

UNFUSED = 256 * 256  # query-key pairs up to which plain matmuls are faster, see `sdpa`
KeyValue = tuple[Tensor, Tensor]  # (B, h, L, C/h) each
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, h, N, C/h) -> (B, h, N, C/h)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(C/h)) v with PyTorch's fused kernels, or plain matmuls where those are faster."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and q.shape[2] * k.shape[2] <= UNFUSED:
        # The fused kernel's backward pass took 15% of emoji-64's training step; plain matmuls make the step 8% shorter.
        weights = (q @ (k * q.shape[3] ** -0.5).transpose(2, 3)).softmax(3, dtype=torch.float32)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def load_attention_backend(name: str) -> Attend:
    """Return the attention function for `sdpa` (PyTorch) or `xformers` (NVIDIA GPUs only)."""
    if name == "sdpa":
        return sdpa
    if name != "xformers":
        raise UNetError(f"attention backend {name!r} is unknown; choose 'sdpa' or 'xformers'")
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise UNetError(
            f"attention backend 'xformers' is not installed: pip install 'latentdiff[xformers]' ({error})"
        ) from None

    def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # its layout is (B, N, h, C/h)
        out: Tensor = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    return xformers


class Attention(nn.Module):
    """Multi-head self-attention over pixels, or cross-attention to text features if `context_dim` is given."""

    def __init__(self, width: int, num_heads: int, context_dim: int | None = None, *, upcast: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_cross = context_dim is not None
        self.upcast = upcast
        self.attend: Attend = sdpa
        self.index = 0  # position among the UNet's cross-attentions, set by UNet
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim or width, width, bias=False)
        self.to_v = nn.Linear(context_dim or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list because checkpoints name it to_out.0

    def project(self, context: Tensor) -> KeyValue:
        """Compute the keys and values of (B, L, D) features."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, context: Tensor | Sequence[KeyValue] | None = None) -> Tensor:
        """Attend from x (B, N, C) to itself, text features, or this layer's entry in a list of keys and values."""
        q = self._split(self.to_q(x))
        if context is None:
            k, v = self.project(x)
        elif isinstance(context, Tensor):
            k, v = self.project(context)
        else:
            k, v = context[self.index]
        if self.upcast:
            with torch.autocast(x.device.type, enabled=False):  # autocast would cast back
                out = self.attend(q.float(), k.float(), v.float()).to(q.dtype)
        else:
            out = self.attend(q, k, v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, self.num_heads, -1).transpose(1, 2)  # (B, N, C) -> (B, h, N, C/h)


class GEGLU(nn.Module):
    """Linear layer gated by the GELU of a second one (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Feed-forward network with GEGLU and a hidden layer four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Pre-norm residual block: self-attention, cross-attention to the text, feed-forward network.

    Before the last, a UNet with a history adds attention to earlier steps.
    """

    def __init__(self, width: int, num_heads: int, context_dim: int, *, upcast: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, num_heads, upcast=upcast)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, num_heads, context_dim, upcast=upcast)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)
        self.trajectory: TrajectoryAttention | None = None  # set by UNet

    def forward(self, x: Tensor, context: Tensor | Sequence[KeyValue], trace: Trace | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        if self.trajectory is not None:
            x = x + self.trajectory(x, trace)
        return x + self.ff(self.norm3(x))


class PixelLinear(nn.Conv2d):
    """Linear layer over (B, N, C) tokens, stored as a 1x1 convolution."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__(width, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (LDM, arXiv 2112.10752, appendix E.2.1)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_blocks: int,
        context_dim: int,
        *,
        norm_groups: int,
        linear: bool,
        upcast: bool,
    ) -> None:
        super().__init__()
        projection = nn.Linear if linear else PixelLinear
        self.norm = GroupNorm(norm_groups, width, eps=1e-6)
        self.proj_in = projection(width, width)
        blocks = [TransformerBlock(width, num_heads, context_dim, upcast=upcast) for _ in range(num_blocks)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = projection(width, width)

    def forward(self, x: Tensor, context: Tensor | Sequence[KeyValue], trace: Trace | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W); in channels-last memory both reshapes are views."""
        height, width = x.shape[-2:]
        h = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context, trace)
        h = self.proj_out(h)
        return x + h.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, C, H, W)
