"""`TextEncoder`: prompts in, features out. A BERT of any size through transformers; CLIP's text model is opened too.

Sizes: B prompts, L tokens, D width of the features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.errors import check_whole

from .errors import TextEncoderError, TokenOverflowWarning
from .tokenizer import check_text

MAX_PROMPT = 4096  # tokens; more is no prompt


@dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of a new BERT; the vocabulary and the prompt's length are the tokenizer's.

    Raises:
        TextEncoderError: a value is out of range or two of them do not fit together.
    """

    width: int = 256  # D, which the UNet's context_dim must equal
    num_layers: int = 4  # transformer layers
    num_heads: int = 4  # attention heads, a divisor of the width

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads"):
            check_whole(TextEncoderError, name, getattr(self, name))
        if self.width % self.num_heads:
            raise TextEncoderError(f"num_heads={self.num_heads} does not divide width={self.width}")


class TokenizedPrompts(NamedTuple):
    """Prompts as numbers."""

    tokens: Tensor  # (B, L) int64, on the CPU
    context_mask: Tensor  # (B, L) bool, True = real token, False = padding
    lost: list[int]  # tokens of each prompt that did not fit


class TextEncoder(nn.Module):
    """A transformer over the tokens of a prompt: `encoder(prompts) -> context (B, L, D)`.

    All prompts become L tokens. Padding is masked inside BERT; it is not masked in the UNet's cross-attention, in
    training as in drawing, because diffusers' pipelines do not mask it there either. The null prompt is the empty
    string, encoded. There is no dropout.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int, *, use_attention_mask: bool = True) -> None:
        """Wrap a model that transformers would call as `model(input_ids=..., attention_mask=...)`.

        Args:
            model: BertModel, CLIPTextModel or one that is called like them; its config has `hidden_size` and
                `max_position_embeddings`.
            tokenizer: the transformers tokenizer that belongs to it.
            max_length: L, at most the model's positions.
            use_attention_mask: whether padding is masked inside the model.

        Raises:
            TextEncoderError: `max_length` or the vocabulary does not fit the model.
        """
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.use_attention_mask = use_attention_mask
        config: Any = model.config
        self.context_dim = int(config.hidden_size)  # D
        positions = config.max_position_embeddings
        if not isinstance(max_length, int) or isinstance(max_length, bool) or not 3 <= max_length <= positions:
            raise TextEncoderError(f"max_length={max_length!r}: expected 3 to {positions}, the model's positions")
        if len(tokenizer) > config.vocab_size:
            raise TextEncoderError(f"the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}")
        self.set_trainable(True)

    @classmethod
    def new(cls, config: TextEncoderConfig, tokenizer: Any) -> TextEncoder:
        """A BERT with random weights for a tokenizer, for instance one from `train_tokenizer`.

        Raises:
            TextEncoderError: the tokenizer does not say how long a prompt is.
        """
        if tokenizer.model_max_length > MAX_PROMPT:  # transformers' word for "not set" is 1e30
            raise TextEncoderError(f"the tokenizer's model_max_length is not set: expected 3 to {MAX_PROMPT}")
        from transformers import BertConfig, BertModel

        bert = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
            use_attention_mask=True,
        )
        return cls(BertModel(bert), tokenizer, tokenizer.model_max_length)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        tokenizer: str | Path | None = None,
        *,
        max_length: int | None = None,
        use_attention_mask: bool | None = None,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> TextEncoder:
        """Open a BERT or CLIP text model: a folder, or a name on the Hugging Face hub such as `bert-base-uncased`.

        Args:
            name: folder with `config.json` and `model.safetensors`, or hub name.
            tokenizer: folder or hub name of the tokenizer; by default the model's own folder, or `tokenizer` beside it.
            max_length: L; by default what the tokenizer says, at most 77 for a BERT with its tokenizer beside it.
            use_attention_mask: by default what the config says, else yes for BERT and no for CLIP.
            dtype: of the weights.
            variant: of the weights' file, such as `fp16`; None: the plain one, or the only variant there is.

        Raises:
            TextEncoderError: nothing there, another kind of model, a file damaged, a tensor missing or misshapen.
        """
        from .files import find_folder, load_model, load_tokenizer

        folder = find_folder(name, variant)
        model, kind = load_model(folder, dtype, variant)
        loaded, own_folder = load_tokenizer(folder, tokenizer, kind)
        config: Any = model.config
        positions = int(config.max_position_embeddings)
        if max_length is None:
            # BERT's 512 is what the model can read, not a length for prompts.
            max_length = min(loaded.model_max_length, positions, 77 if own_folder else positions)
        if use_attention_mask is None:
            use_attention_mask = getattr(config, "use_attention_mask", kind == "bert")
        if not isinstance(use_attention_mask, bool):
            raise TextEncoderError(f"{name}: use_attention_mask={use_attention_mask!r}: expected true or false")
        return cls(model, loaded, max_length, use_attention_mask=use_attention_mask).eval()

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer_folder: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> None:
        """Write the model to `folder` and the tokenizer to `tokenizer_folder`, by default `tokenizer` beside it.

        Weights are cast to `dtype` on the way and named for a `variant`.

        Both are what diffusers expects: the length is in the tokenizer's config, `use_attention_mask` in the model's.
        """
        from .files import save_model, save_tokenizer

        folder = Path(folder)
        save_model(self.model, folder, self.use_attention_mask, dtype, variant)
        save_tokenizer(self.tokenizer, Path(tokenizer_folder or folder.parent / "tokenizer"), self.max_length)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to features (B, L, D).

        Raises:
            TextEncoderError: not a list of strings, or an empty one.
        """
        tokens, context_mask, _ = self.tokenize(prompts)
        return self.encode(tokens, context_mask)

    def tokenize(self, prompts: Sequence[str]) -> TokenizedPrompts:
        """Prompts as L tokens each. What does not fit is cut off, counted, and warned of (TokenOverflowWarning).

        Raises:
            TextEncoderError: not a list of strings, or an empty one.
        """
        if not isinstance(prompts, list | tuple) or not prompts:
            raise TextEncoderError(f"prompts={prompts!r}: expected a list of at least one string")
        for prompt in prompts:
            check_text("prompt", prompt)
        prompts = list(prompts)
        lengths = [len(ids) for ids in self.tokenizer(prompts, verbose=False)["input_ids"]]
        lost = [max(0, length - self.max_length) for length in lengths]
        if any(lost):
            self._warn_of_overflow(prompts, lost)
        batch = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return TokenizedPrompts(batch["input_ids"], batch["attention_mask"].bool(), lost)

    def encode(self, tokens: Tensor, context_mask: Tensor) -> Tensor:
        """Tokens (B, L) and their mask (B, L), on any device, to features (B, L, D)."""
        device = next(self.model.parameters()).device
        attention_mask = context_mask.to(device) if self.use_attention_mask else None
        config: Any = self.model.config
        if attention_mask is not None and config._attn_implementation == "sdpa":
            # As transformers would make it of two dimensions, but for a look at its values, which waits for a GPU.
            attention_mask = attention_mask.bool()[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        context: Tensor = self.model(input_ids=tokens.to(device), attention_mask=attention_mask).last_hidden_state
        return context

    def null_context(self, batch_size: int = 1) -> Tensor:
        """Features of the empty prompt, (batch_size, L, D)."""
        context: Tensor = self([""])
        return context.expand(batch_size, -1, -1)

    def set_trainable(self, trainable: bool) -> None:
        """Train the weights or freeze them. BERT's pooler, which features do not pass through, stays frozen."""
        self.model.requires_grad_(trainable)
        pooler = getattr(self.model, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)

    def _warn_of_overflow(self, prompts: Sequence[str], lost: Sequence[int]) -> None:
        index = max(range(len(lost)), key=lost.__getitem__)
        ids = self.tokenizer(prompts[index], verbose=False, add_special_tokens=False)["input_ids"]
        tail = self.tokenizer.decode(ids[-lost[index] :])
        warnings.warn(
            f"{sum(map(bool, lost))} of {len(lost)} prompts are longer than {self.max_length} tokens; "
            f"one loses its last {lost[index]}: {tail[:80]!r}",
            TokenOverflowWarning,
            stacklevel=3,
        )
