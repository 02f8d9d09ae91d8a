"""`TextEncoder`: prompts to features, with a BERT of any size or CLIP's text model from transformers.

Shapes: B prompts, L tokens, D feature width.
"""

from __future__ import annotations

import threading
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.errors import check_positive_int

from .errors import TextEncoderError, TokenOverflowWarning
from .tokenizer import check_text

MAX_TOKENS = 4096  # of a prompt
TOKENIZING = threading.Lock()  # padding and truncation are settings of a tokenizer that all its callers share


@dataclass(frozen=True)
class TextEncoderConfig:
    """Architecture of a new BERT, except for what its tokenizer decides; raises TextEncoderError for invalid values."""

    width: int = 256  # D; must equal the UNet's context_dim
    num_layers: int = 4  # transformer layers
    num_heads: int = 4  # attention heads; must divide the width

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads"):
            check_positive_int(TextEncoderError, name, getattr(self, name))
        if self.width % self.num_heads:
            raise TextEncoderError(f"num_heads={self.num_heads} does not divide width={self.width}")


class TokenizedPrompts(NamedTuple):
    """Token ids of prompts."""

    tokens: Tensor  # (B, L) int64, on the CPU
    context_mask: Tensor  # (B, L) bool, True = real token, False = padding
    lost: list[int]  # number of tokens cut off each prompt


class TextEncoder(nn.Module):
    """Transformer over the tokens of prompts: `encoder(prompts) -> context (B, L, D)`.

    All prompts become L tokens. Padding is masked inside BERT but not in the UNet's cross-attention, in training and
    sampling alike, because diffusers' pipelines do not mask it there either. The null prompt is the empty string.
    There is no dropout. Prompts other than a non-empty list of strings raise TextEncoderError.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int, *, use_attention_mask: bool = True) -> None:
        """Wrap a transformers model, such as BertModel or CLIPTextModel, and its tokenizer.

        Args:
            model: called as `model(input_ids=..., attention_mask=...)`; its config has `hidden_size`, `vocab_size` and
                `max_position_embeddings`.
            tokenizer: the model's transformers tokenizer.
            max_length: L, at most the model's number of positions.
            use_attention_mask: whether the model masks padding.

        Raises:
            TextEncoderError: `max_length` or the vocabulary is too large for the model.
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
            raise TextEncoderError(f"max_length={max_length!r}: expected 3 to {positions}, the model's limit")
        if len(tokenizer) > config.vocab_size:
            raise TextEncoderError(f"the tokenizer has {len(tokenizer)} tokens, but the model only {config.vocab_size}")
        self.set_trainable(True)

    @classmethod
    def new(cls, config: TextEncoderConfig, tokenizer: Any) -> TextEncoder:
        """Create a BERT with random weights for a tokenizer with a `model_max_length`, e.g. from `train_tokenizer`."""
        if tokenizer.model_max_length > MAX_TOKENS:  # transformers' default, 1e30, means "not set"
            raise TextEncoderError(f"the tokenizer's model_max_length is not set: expected 3 to {MAX_TOKENS}")
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
        """Load a BERT or CLIP text model from a folder or the Hugging Face hub, such as `bert-base-uncased`.

        Args:
            name: folder with `config.json` and `model.safetensors`, or hub name.
            tokenizer: folder or hub name of the tokenizer; by default the model's folder, or `tokenizer` next to it.
            max_length: L; by default the tokenizer's, and at most 77 if the tokenizer is in the model's folder.
            use_attention_mask: by default the config's, or else True for BERT and False for CLIP.
            dtype: of the weights.
            variant: of the weight file, such as `fp16`; None means the plain file, or the only variant.

        Raises:
            TextEncoderError: a file is missing, damaged or of an unsupported model, or its tensors do not match.
        """
        from .files import find_folder, load_model, load_tokenizer

        folder = find_folder(name, variant)
        model, kind = load_model(folder, dtype, variant)
        loaded, own_folder = load_tokenizer(folder, tokenizer, kind)
        config: Any = model.config
        positions = int(config.max_position_embeddings)
        if max_length is None:
            # BERT's 512 is a limit of the model, not a length for prompts.
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
        """Write the model to `folder` and the tokenizer to `tokenizer_folder`, by default `tokenizer` next to it.

        Weights are saved in `dtype`, in a file named for `variant`. As diffusers expects, the prompt length is in the
        tokenizer's config and `use_attention_mask` in the model's.
        """
        from .files import save_model, save_tokenizer

        folder = Path(folder)
        save_model(self.model, folder, self.use_attention_mask, dtype, variant)
        save_tokenizer(self.tokenizer, Path(tokenizer_folder or folder.parent / "tokenizer"), self.max_length)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Encode a non-empty list of prompts as features (B, L, D)."""
        tokens, context_mask, _ = self.tokenize(prompts)
        return self.encode(tokens, context_mask)

    def tokenize(self, prompts: Sequence[str]) -> TokenizedPrompts:
        """Convert a non-empty list of prompts to L tokens each, with a TokenOverflowWarning if any is cut off."""
        if not isinstance(prompts, list | tuple) or not prompts:
            raise TextEncoderError(f"prompts={prompts!r}: expected a list of at least one string")
        for prompt in prompts:
            check_text("prompt", prompt)
        prompts = [unicodedata.normalize("NFC", prompt) for prompt in prompts]
        with TOKENIZING:
            batch = self.tokenizer(
                prompts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
            )
        if any(lost := self.lost_tokens(prompts)):
            self._warn_of_overflow(prompts, lost)
        return TokenizedPrompts(batch["input_ids"], batch["attention_mask"].bool(), lost)

    def lost_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens at the end of each prompt in NFC are cut off."""
        with TOKENIZING:
            tokens = self.tokenizer(list(prompts), verbose=False)["input_ids"]
        return [max(0, len(ids) - self.max_length) for ids in tokens]

    def knows(self, prompt: str) -> bool:
        """Return whether any word of a prompt in NFC is in the vocabulary; the empty prompt is known."""
        with TOKENIZING:
            ids = self.tokenizer(prompt, verbose=False, add_special_tokens=False)["input_ids"]
        return not ids or any(each != self.tokenizer.unk_token_id for each in ids)

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """Return the characters, `start` to `stop`, that each token of a prompt in NFC stands for."""
        with TOKENIZING:
            batch = self.tokenizer(prompt, truncation=True, max_length=self.max_length, return_offsets_mapping=True)
        return list(batch["offset_mapping"])

    def encode(self, tokens: Tensor, context_mask: Tensor) -> Tensor:
        """Encode tokens (B, L) and their mask (B, L), on any device, as features (B, L, D)."""
        device = next(self.model.parameters()).device
        attention_mask = context_mask.to(device) if self.use_attention_mask else None
        config: Any = self.model.config
        if attention_mask is not None and config._attn_implementation == "sdpa":
            # As transformers would expand it, but without inspecting its values, which would synchronize with the GPU.
            attention_mask = attention_mask.bool()[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        context: Tensor = self.model(input_ids=tokens.to(device), attention_mask=attention_mask).last_hidden_state
        return context

    def null_context(self, batch_size: int = 1) -> Tensor:
        """Return the features of the empty prompt, (batch_size, L, D)."""
        context: Tensor = self([""])
        return context.expand(batch_size, -1, -1)

    def set_trainable(self, trainable: bool) -> None:
        """Make the weights trainable or freeze them; BERT's pooler, which the features bypass, stays frozen."""
        self.model.requires_grad_(trainable)
        pooler = getattr(self.model, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)

    def _warn_of_overflow(self, prompts: Sequence[str], lost: Sequence[int]) -> None:
        index = max(range(len(lost)), key=lost.__getitem__)
        with TOKENIZING:
            ids = self.tokenizer(prompts[index], verbose=False, add_special_tokens=False)["input_ids"]
        tail = self.tokenizer.decode(ids[-lost[index] :])
        warnings.warn(
            f"{sum(map(bool, lost))} of {len(lost)} prompts are longer than {self.max_length} tokens and are cut off; "
            f"the longest loses its last {lost[index]}: {tail[:80]!r}",
            TokenOverflowWarning,
            stacklevel=3,
        )
