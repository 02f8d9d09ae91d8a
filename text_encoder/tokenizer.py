"""A WordPiece vocabulary trained on the captions at hand (arXiv 1609.08144, section 4.1), as a BERT tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .errors import TextEncoderError

if TYPE_CHECKING:
    from transformers import BertTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def check_text(what: str, text: object) -> None:
    """Refuse what is no text.

    Raises:
        TextEncoderError: not a string, or one with half a character (a lone surrogate).
    """
    if not isinstance(text, str):
        raise TextEncoderError(f"{what} {text!r}: expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TextEncoderError(f"{what} {text!a}: not valid Unicode") from None


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int = 8192, max_length: int = 77, min_frequency: int = 2
) -> BertTokenizerFast:
    """Learn a lower-case WordPiece vocabulary. The same captions give the same one, in whatever order they come.

    Args:
        captions: the training captions.
        vocab_size: entries at the most; fewer where the captions have no more to offer.
        max_length: tokens of a prompt, [CLS] and [SEP] included.
        min_frequency: how often a piece must occur to get an entry of its own.

    Raises:
        TextEncoderError: the captions hold no words, or a number is out of range.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast

    for name, value, least in (
        ("vocab_size", vocab_size, 6),
        ("max_length", max_length, 3),
        ("min_frequency", min_frequency, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise TextEncoderError(f"{name}={value!r}: expected a whole number from {least} up")
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    if isinstance(captions, str):
        raise TextEncoderError(f"captions={captions!r}: expected many strings, not one")
    for caption in captions:
        check_text("caption", caption)
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    if not words:
        raise TextEncoderError("the captions hold no words to learn a vocabulary from")
    # The trainer breaks ties by the pieces' numbers, and numbers inner letters as it meets them, in an order that
    # changes between runs. Named up front, in order, they have fixed numbers, and the vocabulary is always the same.
    letters = {letter for word in words for letter in word}
    if len(SPECIAL_TOKENS) + 2 * len(letters) > vocab_size:
        raise TextEncoderError(
            f"vocab_size={vocab_size}: the captions have {len(letters)} letters, which need two entries each, "
            f"and there are {len(SPECIAL_TOKENS)} special tokens"
        )
    inner_letters = sorted({f"##{letter}" for word in words for letter in word[1:]})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *inner_letters],
        show_progress=False,
    )
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator((word for word in sorted(words) for _ in range(words[word])), trainer)
    pieces = sorted(set(learner.get_vocab()) - set(SPECIAL_TOKENS))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *pieces])}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=max_length)
