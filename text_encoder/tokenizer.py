"""WordPiece vocabulary trained on a dataset's captions (arXiv 1609.08144, section 4.1), as a BERT tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .errors import TextEncoderError

if TYPE_CHECKING:
    from transformers import BertTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def check_text(what: str, text: object) -> None:
    """Raise TextEncoderError unless `text` is a string without lone surrogates."""
    if not isinstance(text, str):
        raise TextEncoderError(f"{what} {text!r}: expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TextEncoderError(f"{what} {text!a}: not valid Unicode") from None


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int = 8192, max_length: int = 77, min_frequency: int = 2
) -> BertTokenizerFast:
    """Learn a lowercase WordPiece vocabulary with accents; the same captions in any order give the same one.

    Args:
        captions: the training captions.
        vocab_size: maximum number of entries; the captions may yield fewer.
        max_length: tokens per prompt, including [CLS] and [SEP].
        min_frequency: how often a piece must occur to get an entry.

    Raises:
        TextEncoderError: the captions contain no words, or a number is out of range.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast

    for name, value, least in (
        ("vocab_size", vocab_size, 6),
        ("max_length", max_length, 3),
        ("min_frequency", min_frequency, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise TextEncoderError(f"{name}={value!r}: expected an integer of at least {least}")
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Accents and voicing marks tell words apart. NFC: with them, composed and decomposed letters would differ.
    normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.BertNormalizer(lowercase=True, strip_accents=False)]
    )
    words = _count_words(captions, normalizer, pre_tokenizer)
    # The trainer breaks ties by token id, and gives ids to word-internal characters in an order that changes between
    # runs. Listing them up front, sorted, fixes their ids and makes the vocabulary reproducible.
    characters = {character for word in words for character in word}
    inner_characters = sorted({f"##{character}" for word in words for character in word[1:]})
    if len(SPECIAL_TOKENS) + len(characters) + len(inner_characters) > vocab_size:
        raise TextEncoderError(
            f"vocab_size={vocab_size} is too small: the captions have {len(characters)} distinct characters, which "
            f"need an entry each, {len(inner_characters)} of them another within words, and there are "
            f"{len(SPECIAL_TOKENS)} special tokens"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *inner_characters],
        show_progress=False,
    )
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wordpiece.train_from_iterator((word for word in sorted(words) for _ in range(words[word])), trainer)
    pieces = sorted(set(wordpiece.get_vocab()) - set(SPECIAL_TOKENS))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *pieces])}
    tokenizer = BertTokenizerFast(
        vocab=vocabulary, do_lower_case=True, strip_accents=False, model_max_length=max_length
    )
    tokenizer.backend_tokenizer.normalizer = normalizer  # transformers drops NFC on loading: TextEncoder does it, too
    return tokenizer


def _count_words(captions: Iterable[str], normalizer: Any, pre_tokenizer: Any) -> Counter[str]:
    words: Counter[str] = Counter()
    if isinstance(captions, str):
        raise TextEncoderError(f"captions={captions!r}: expected an iterable of strings, not a string")
    for caption in captions:
        check_text("caption", caption)
        words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(caption)))
    if not words:
        raise TextEncoderError("the captions contain no words to learn a vocabulary from")
    return words
