"""The WordPiece vocabulary: what it contains, and that training it is reproducible."""

import json
import subprocess
import sys

import pytest

from text_encoder import TextEncoderError, train_tokenizer
from text_encoder.tokenizer import SPECIAL_TOKENS

CAPTIONS = [
    f"{size} {color} {thing}"
    for size in ("a big", "a small", "the smallest")
    for color in ("red", "green", "greenish", "Crème")
    for thing in ("apple", "car with wheels", "smiling face", "glass of wine", "smiling cat")
]


def test_words_and_pieces():
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=300, max_length=12)
    assert tokenizer.tokenize("A RED apple") == ["a", "red", "apple"]
    assert tokenizer.tokenize("crème") == ["creme"]
    assert all(token != "[UNK]" for token in tokenizer.tokenize("greenapple wheelish"))  # new words, known pieces
    assert tokenizer.tokenize("苹") == ["[UNK]"]
    ids = tokenizer("a red apple")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 12


def test_size_is_a_limit():
    assert len(train_tokenizer(CAPTIONS, vocab_size=50)) == 50
    assert len(train_tokenizer(CAPTIONS, vocab_size=100_000)) < 200


def test_same_vocabulary_in_every_run_and_order():
    """Ids depend only on the captions, because token caches and resumed runs rely on them."""
    expected = train_tokenizer(CAPTIONS, vocab_size=80).get_vocab()
    assert train_tokenizer(iter(CAPTIONS[::-1]), vocab_size=80).get_vocab() == expected
    script = (
        "import sys, json; from text_encoder import train_tokenizer;"
        "print(json.dumps(train_tokenizer(json.load(sys.stdin), vocab_size=80).get_vocab(), sort_keys=True))"
    )
    for seed in ("1", "2", "3", "4"):
        run = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps(CAPTIONS),
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PATH": "", "RAYON_NUM_THREADS": seed},
            check=True,
        )
        assert json.loads(run.stdout) == expected


@pytest.mark.parametrize(
    ("captions", "options", "message"),
    [
        ([], {}, "no words to learn a vocabulary from"),
        (["", " "], {}, "no words"),
        ("a red apple", {}, "expected an iterable of strings, not a string"),
        (["a", None], {}, "caption None: expected a string"),
        (["\ud800"], {}, "not valid Unicode"),
        (CAPTIONS, {"vocab_size": 5}, "vocab_size=5"),
        (CAPTIONS, {"vocab_size": 30}, r"vocab_size=30 is too small: the captions have \d+ distinct characters"),
        (CAPTIONS, {"vocab_size": 60.5}, r"vocab_size=60\.5"),
        (CAPTIONS, {"min_frequency": 0}, "min_frequency=0"),
        (CAPTIONS, {"max_length": 2}, "max_length=2"),
    ],
)
def test_wrong_arguments(captions, options, message):
    with pytest.raises(TextEncoderError, match=message):
        train_tokenizer(captions, **options)
