"""The denoising UNet of latent diffusion (arXiv 2112.10752), with diffusers' parameter names and folder layout.

Shapes: B batch, C channels, H W latent height and width, L tokens, D text feature width, S timesteps of a schedule,
E = 4 * block_out_channels[0] time embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentdiff.files.pretrained import Pretrained
from latentdiff.norms import GroupNorm

from .attention import Attention, KeyValue, SpatialTransformer, TransformerBlock, load_attention_backend
from .blocks import Context, Downsample, Level, ResBlock, Time, Upsample
from .config import FILES, UNetConfig
from .errors import UNetError
from .trajectory import History, Trace, TrajectoryAttention


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Embed timesteps (B,) as in DDPM (arXiv 2006.11239, appendix B), cosines first as in LDM: (B, width) float32."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Two linear layers from sinusoids to the E-wide embedding that conditions every ResBlock."""

    def __init__(self, width: int, time_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps (B,) as (B, E)."""
        features = sinusoids(t, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


def make_resnet(config: UNetConfig, in_width: int, width: int) -> ResBlock:
    """Build a ResBlock with the UNet's time embedding width and normalization."""
    time_dim = 4 * config.block_out_channels[0]
    return ResBlock(in_width, width, time_dim, norm_groups=config.norm_groups, norm_eps=config.norm_eps)


def make_transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    """Build a transformer with the width and heads of a level."""
    return SpatialTransformer(
        config.block_out_channels[level],
        config.heads_per_level[level],
        config.transformer_layers,
        config.context_dim,
        norm_groups=config.norm_groups,
        linear=config.linear_projection,
        upcast=config.upcast_attention,
    )


def make_level(config: UNetConfig, level: int, in_widths: list[int]) -> Level:
    """Build one ResBlock per entry of `in_widths`, each followed by a transformer if the level has attention."""
    resnets = [make_resnet(config, in_width, config.block_out_channels[level]) for in_width in in_widths]
    has_attention = level in config.attention_levels
    return Level(resnets, [make_transformer(config, level) for _ in resnets] if has_attention else [])


def make_down_blocks(config: UNetConfig) -> tuple[list[Level], list[int]]:
    """Build the levels from the outermost to the lowest; also return the widths of the skip connections."""
    levels: list[Level] = []
    skips = [config.block_out_channels[0]]  # the output of conv_in
    for index, width in enumerate(config.block_out_channels):
        level = make_level(config, index, [skips[-1]] + [width] * (config.layers_per_block - 1))
        skips += [width] * config.layers_per_block
        if index < len(config.block_out_channels) - 1:
            level.downsamplers.append(Downsample(width))
            skips.append(width)
        levels.append(level)
    return levels, skips


def make_up_blocks(config: UNetConfig, skips: list[int]) -> list[Level]:
    """Build the levels from the lowest to the outermost; each ResBlock also takes the latest unused skip connection."""
    levels: list[Level] = []
    skips, below = list(skips), config.block_out_channels[-1]
    for index in reversed(range(len(config.block_out_channels))):
        width = config.block_out_channels[index]
        in_widths = [(width if layer else below) + skips.pop() for layer in range(config.layers_per_block + 1)]
        level = make_level(config, index, in_widths)
        if index > 0:
            level.upsamplers.append(Upsample(width))
        levels.append(level)
        below = width
    return levels


class UNet(Pretrained):
    """Denoising UNet: `unet(x, t, context)` predicts from noisy latents, timesteps and text features.

    Whether it predicts noise, clean latents or velocity depends on how it is trained. A new UNet predicts zero: as in
    LDM, its last layer and the last layer of each ResBlock and transformer are initialized to zero.
    """

    files, config_class = FILES, UNetConfig
    config: UNetConfig
    down_blocks: Iterable[Level]
    up_blocks: Iterable[Level]

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        widths = config.block_out_channels
        down_blocks, skips = make_down_blocks(config)
        middle = [make_resnet(config, widths[-1], widths[-1]) for _ in range(2)]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList(down_blocks)  # type: ignore[assignment]
        self.mid_block = Level(middle, [make_transformer(config, len(widths) - 1)])
        self.up_blocks = nn.ModuleList(make_up_blocks(config, skips))  # type: ignore[assignment]
        self.conv_norm_out = GroupNorm(config.norm_groups, widths[0], eps=config.norm_eps, silu=True)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        for index, res in enumerate(self.resnets()):
            res.index = index
        for index, attention in enumerate(self.cross_attentions()):
            attention.index = index
        self.num_projections = (len(self.resnets()), len(self.cross_attentions()))  # counted once, not at every step
        self._zero_last_layers()
        if config.trajectory_attention:  # last, so that all other weights start as they would without it
            self.add_trajectory_attention(config.trajectory_attention)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, x: Tensor, t: Tensor | Sequence[Tensor], context: Context, history: History | None = None
    ) -> Tensor | tuple[Tensor, History]:
        """Predict from noisy latents.

        Args:
            x: noisy latents (B, in_channels, H, W), of any H and W.
            t: timesteps (B,), or () for the entire batch, int64 or float; or one step of `project_time`'s result.
            context: text features (B, L, D), or `project_context`'s result for them.
            history: earlier steps of the same trajectories, for a UNet with attention to them; `History()` at first.

        Returns:
            The prediction, (B, out_channels, H, W); if there is a history, also that of the next step.

        Raises:
            UNetError: a shape or dtype does not match.
        """
        self._check_inputs(x, t, context)
        trace = self._trace(history, x.shape[0])
        time = self.time_embedding(t.reshape(-1)) if isinstance(t, Tensor) else t  # (B or 1, E)
        x = self.conv_in(x.to(memory_format=torch.channels_last))
        skips = [x]
        for block in self.down_blocks:
            for resnet, transformer in block.layers():
                x = self._layer(resnet, transformer, x, time, context, trace)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        for resnet, transformer in self.mid_block.layers():
            x = self._layer(resnet, transformer, x, time, context, trace)
        for block in self.up_blocks:
            for resnet, transformer in block.layers():
                x = self._layer(resnet, transformer, torch.cat([x, skips.pop()], dim=1), time, context, trace)
            for upsample in block.upsamplers:
                x = upsample(x, skips[-1].shape[-2:])
        x = self.conv_out(self.conv_norm_out(x))
        if history is None or trace is None:
            return x
        added = [trace.added[block] for block in sorted(trace.added)]
        return x, history.followed_by(added, self.config.trajectory_attention)

    def start_history(self) -> History | None:
        """Return the history of a trajectory's first step; None if this UNet does not attend to earlier steps."""
        return History() if self.config.trajectory_attention else None

    def add_trajectory_attention(self, num_steps: int) -> None:
        """Let every transformer block attend to up to `num_steps` earlier steps; until it is trained, this adds zero.

        Raises UNetError if the number is out of range.
        """
        self.config = replace(self.config, trajectory_attention=num_steps)
        blocks = [layer for layer in self.modules() if isinstance(layer, TransformerBlock)]
        for index, block in enumerate(blocks):
            weight = block.attn1.to_q.weight
            with weight.device:
                layer = TrajectoryAttention(weight.shape[0], block.attn1.num_heads, num_steps, index)
            block.trajectory = layer.to(weight.dtype)

    def project_context(self, context: Tensor) -> list[KeyValue]:
        """Compute every cross-attention's keys and values of text features (B, L, D), once per prompt, not per step.

        Passing them to `forward` instead of the features gives a bit-identical result. Raises UNetError if the shape or
        dtype does not match.
        """
        self._check_context(context, context.shape[0] if context.dim() else 0)
        return [attention.project(context) for attention in self.cross_attentions()]

    def project_time(self, t: Tensor) -> list[Tensor]:
        """Compute `shifts`, what each ResBlock adds at timesteps t (S,), once per schedule: a list of (S, C) tensors.

        At step i, pass `[shift[i : i + 1] for shift in shifts]` to `forward`, for any batch size; the result is
        bit-identical to passing t[i]. Raises UNetError if the shape or dtype does not match.
        """
        if t.dim() != 1:
            raise UNetError(f"t has shape {tuple(t.shape)}; expected (S,), one timestep per step")
        self._check_time(t, t.shape[0])
        # Row by row, because a linear layer rounds a batch of rows differently from a single one.
        times = [self.time_embedding(row) for row in torch.split(t, 1)]
        return [torch.cat([resnet.project(time) for time in times]) for resnet in self.resnets()]

    def set_attention_backend(self, name: str) -> None:
        """Use `sdpa` (the default) or `xformers` for all attention; raise UNetError if unknown or not installed."""
        attend = load_attention_backend(name)
        for layer in self.modules():
            if isinstance(layer, Attention):
                layer.attend = attend

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute ResBlocks and transformers in the backward pass instead of storing their activations."""
        self.gradient_checkpointing = enabled

    def resnets(self) -> list[ResBlock]:
        """Return all ResBlocks, in the order of `project_time`."""
        return [layer for layer in self.modules() if isinstance(layer, ResBlock)]

    def cross_attentions(self) -> list[Attention]:
        """Return all cross-attentions, in the order of `project_context`."""
        return [layer for layer in self.modules() if isinstance(layer, Attention) and layer.is_cross]

    def _layer(
        self, resnet: nn.Module, transformer: nn.Module | None, x: Tensor, time: Time, context: Context,
        trace: Trace | None,
    ) -> Tensor:  # fmt: skip
        run: Callable[..., Tensor] = _checkpointed if self.gradient_checkpointing and torch.is_grad_enabled() else _call
        x = run(resnet, x, time)
        return x if transformer is None else run(transformer, x, context, trace)

    def _trace(self, history: History | None, batch: int) -> Trace | None:
        if not self.config.trajectory_attention:
            if history is not None:
                raise UNetError("this UNet takes no history: it has no attention to earlier steps")
            return None
        history = history or History()
        if history.steps and (found := history.steps[0].blocks[0][0].shape[0]) != batch:
            raise UNetError(f"the history is of a batch of {found}; x has {batch}")
        return Trace(history)

    def _zero_last_layers(self) -> None:
        ends: list[nn.Module] = [self.conv_out]
        ends += [layer.conv2 for layer in self.resnets()]
        ends += [layer.proj_out for layer in self.modules() if isinstance(layer, SpatialTransformer)]
        for layer in ends:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def _check_inputs(self, x: Tensor, t: Tensor | Sequence[Tensor], context: Context) -> None:
        channels = self.config.in_channels
        if x.dim() != 4 or x.shape[1] != channels or not x.numel():
            raise UNetError(f"x has shape {tuple(x.shape)}; expected (B, {channels}, H, W)")
        self._check_dtype("x", x)
        batch = x.shape[0]
        if isinstance(t, Tensor):
            self._check_time(t, batch)
        elif len(t) != (expected := self.num_projections[0]):
            raise UNetError(f"t has projections for {len(t)} ResBlocks; this UNet has {expected}")
        elif t[0].shape[0] not in (1, batch):
            raise UNetError(f"t has projections for a batch of {t[0].shape[0]}; x has {batch}")
        if isinstance(context, Tensor):
            self._check_context(context, batch)
        elif len(context) != (expected := self.num_projections[1]):
            raise UNetError(
                f"context has keys and values for {len(context)} cross-attentions; this UNet has {expected}"
            )
        elif context[0][0].shape[0] != batch:
            raise UNetError(f"context has keys and values for a batch of {context[0][0].shape[0]}; x has {batch}")

    def _check_time(self, t: Tensor, batch: int) -> None:
        if t.shape not in ((), (1,), (batch,)):
            raise UNetError(f"t has shape {tuple(t.shape)}; expected () or ({batch},)")
        if t.dtype not in (torch.int64, torch.float32, torch.float64):  # bfloat16 rounds 981 to 980
            raise UNetError(f"t is {t.dtype}; expected int64 (or float32 for fractional timesteps)")

    def _check_context(self, context: Tensor, batch: int) -> None:
        width = self.config.context_dim
        if context.dim() != 3 or context.shape[0] != batch or context.shape[2] != width or not context.numel():
            raise UNetError(f"context has shape {tuple(context.shape)}; expected ({batch}, L, {width})")
        self._check_dtype("context", context)

    def _check_dtype(self, name: str, x: Tensor) -> None:
        weights = self.conv_in.weight.dtype
        if x.dtype != weights and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise UNetError(f"{name} is {x.dtype} and the weights are {weights}: cast one of them or use autocast")


def _call(layer: nn.Module, *inputs: Any) -> Tensor:
    return layer(*inputs)


def _checkpointed(layer: nn.Module, *inputs: Any) -> Tensor:
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)  # no layer is stochastic
