"""The WordPiece vocabulary: what it contains, and that training it is reproducible."""

import json
import subprocess
import sys
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import BertTokenizerFast

from text_encoder import TextEncoder, TextEncoderConfig, TextEncoderError, train_tokenizer
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
    assert tokenizer.tokenize("CRÈME") == ["crème"]
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


@pytest.mark.slow
def test_same_vocabulary_in_every_run_and_order():
    """Ids depend only on the captions, because token caches and resumed runs rely on them."""
    expected = train_tokenizer(CAPTIONS, vocab_size=80).get_vocab()
    assert train_tokenizer(iter(CAPTIONS[::-1]), vocab_size=80).get_vocab() == expected
    script = (
        "import sys, json; from text_encoder import train_tokenizer;"
        "print(json.dumps(train_tokenizer(json.load(sys.stdin), vocab_size=80).get_vocab(), sort_keys=True))"
    )
    for seed in ("1", "2"):
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


WORDS_THAT_DIFFER = [("Bär", "Bar"), ("año", "ano"), ("con bò", "con bơ"), ("सुन", "सन"), ("パン", "ハン"),
                     ("мой", "мои"), ("แม่", "แม"), ("Łódź", "Lodz"), ("가", "기"), ("für", "fur")]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), WORDS_THAT_DIFFER)
def test_accents_and_voicing_marks_are_kept(one, other, tmp_path):
    """Case is folded, and composed and decomposed letters are one, also for an encoder that was saved and opened."""
    tokenizer = train_tokenizer([one, other] * 3, vocab_size=400, max_length=16)
    encoder = TextEncoder.new(TextEncoderConfig(16, 1, 1), tokenizer)
    encoder.save_pretrained(tmp_path / "text_encoder")
    for each in (encoder, TextEncoder.from_pretrained(tmp_path / "text_encoder")):
        first, second, upper, apart = each.tokenize([one, other, one.upper(), unicodedata.normalize("NFD", one)]).tokens
        assert not torch.equal(first, second)
        assert torch.equal(first, upper)
        assert torch.equal(first, apart)


def test_a_chinese_letter_needs_one_entry():
    letters = [chr(0x4E00 + number) for number in range(400)]
    assert len(train_tokenizer(["".join(letters)] * 2, vocab_size=450, max_length=16)) <= 450
    with pytest.raises(TextEncoderError, match=r"400 distinct characters, which need an entry each, 0 of them another"):
        train_tokenizer(["".join(letters)] * 2, vocab_size=300, max_length=16)
    with pytest.raises(TextEncoderError, match=r"26 distinct characters, which need an entry each, 25 of them another"):
        train_tokenizer(["abcdefghijklmnopqrstuvwxyz"] * 2, vocab_size=50, max_length=16)


def test_old_vocabularies_read_as_they_were():
    """A tokenizer that strips accents, as BERT's own does, goes on doing so."""
    vocabulary = {name: index for index, name in enumerate([*SPECIAL_TOKENS, "bar"])}
    tokenizer = BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=8)
    encoder = TextEncoder.new(TextEncoderConfig(16, 1, 1), tokenizer)
    tokens = encoder.tokenize(["bar", "Bär", unicodedata.normalize("NFD", "Bär")]).tokens
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


def test_several_threads_share_an_encoder():
    tokenizer = train_tokenizer(["a cat", "a dog and a cat"] * 3, vocab_size=60, max_length=12)
    encoder = TextEncoder.new(TextEncoderConfig(16, 1, 1), tokenizer)
    asked = [["a cat"], ["a dog and a cat", "a cat " * 20], [""] * 3, ["dog " * 40]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = [encoder.tokenize(prompts) for prompts in asked]

        def work(place):
            found = [encoder.tokenize(asked[place]) for _ in range(60)]
            return all(
                torch.equal(each.tokens, right[place].tokens) and each.lost == right[place].lost for each in found
            )

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, [0, 1, 2, 3] * 4))
