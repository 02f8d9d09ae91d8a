"""Autoregressive: p(x) is a product of conditionals, one pixel after another and R, G, B within it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (B, heads, pixels, head width)


class Block(nn.Module):
    """A pre-norm transformer layer that sees the present and the past."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, place: int = 0) -> Tensor:
        """Map x (B, P, D); with a cache, x is the one token at `place`, whose key and value are added to it."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, P, d)
        if cache is not None:
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, place] = new[:, :, 0]
            k, v = (kept[:, :, : place + 1] for kept in cache)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Autoregressive(nn.Module):
    """A causal transformer with one token a pixel, and a head for each channel that sees the channels before it."""

    def __init__(
        self, pixels: int = 256, channels: int = 3, levels: int = 256, width: int = 128, layers: int = 4, heads: int = 2
    ) -> None:
        super().__init__()
        self.pixels, self.levels = pixels, levels
        self.embed = nn.ModuleList(nn.Embedding(levels, width) for _ in range(channels))
        self.place = nn.Parameter(0.02 * torch.randn(pixels, width))
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, levels))
            for _ in range(channels)
        )
        for embed in self.embed:
            nn.init.normal_(embed.weight, std=0.3)

    def log_probs(self, x: Tensor) -> Tensor:
        """Return log p of every value given all before it; x and the result are (B, pixels, channels)."""
        embedded = [embed(x[..., channel]) for channel, embed in enumerate(self.embed)]
        before = sum(embedded)[:, :-1]
        state = torch.cat([self.start.expand(len(x), 1, -1), before], 1) + self.place
        for block in self.blocks:
            state = block(state)
        found = []
        for channel, head in enumerate(self.heads):
            log_p = head(state).log_softmax(-1)
            found.append(log_p.gather(-1, x[..., channel : channel + 1]))
            state = state + embedded[channel]  # the next channel knows this one
        return torch.cat(found, -1)

    def loss(self, x: Tensor) -> Tensor:
        """Return the mean of -log p per value, in nats."""
        return -self.log_probs(to_sequence(x)).mean()

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p of pictures (B, C, H, W) in nats, (B,): exact."""
        return torch.cat([self.log_probs(to_sequence(part)).double().sum((1, 2)) for part in x.split(64)])

    @torch.no_grad()
    def draw_sequences(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count, pixels, channels), value by value; keys and values of the past are computed once."""
        width, first = self.start.numel(), self.blocks[0]
        shape = (count, first.heads, self.pixels, width // first.heads)
        cache: Cache = [(torch.empty(shape), torch.empty(shape)) for _ in self.blocks]
        drawn = torch.empty(count, self.pixels, len(self.heads), dtype=torch.int64)
        token = self.start.expand(count, -1)
        for place in range(self.pixels):
            state = (token + self.place[place])[:, None]
            for block, kept in zip(self.blocks, cache, strict=True):
                state = block(state, kept, place)
            state, token = state[:, 0], torch.zeros(count, width)
            for channel, head in enumerate(self.heads):
                value = torch.multinomial(head(state).softmax(-1), 1, generator=generator)[:, 0]
                drawn[:, place, channel] = value
                embedded = self.embed[channel](value)
                state, token = state + embedded, token + embedded
        return drawn

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw pictures (count, 3, 16, 16)."""
        side = int(self.pixels**0.5)
        parts = torch.ones(count).split(50)  # the caches of more would leave the processor's own
        drawn = torch.cat([self.draw_sequences(len(part), generator) for part in parts])
        return drawn.transpose(1, 2).unflatten(2, (side, side))


def to_sequence(x: Tensor) -> Tensor:
    """Return pictures (B, C, H, W) row by row, (B, H * W, C); sequences (B, P, C) as they are."""
    return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
