"""TextEncoder with BERT and CLIP: the features that diffusers' pipelines pass to their UNets."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import BertModel, BertTokenizerFast, CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from text_encoder import TextEncoder, TextEncoderConfig, TextEncoderError, TokenOverflowWarning, train_tokenizer

CAPTIONS = ["a red apple", "a green apple with a leaf", "a smiling face", "the red car", "a car and a face"] * 4
PROMPTS = ["a red apple", "", "the smiling face and"]
LONG = "a red apple with a green leaf and the smiling face"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=120, max_length=8)


@pytest.fixture
def encoder(tokenizer) -> TextEncoder:
    return TextEncoder.new(TextEncoderConfig(width=32, num_layers=2, num_heads=4), tokenizer)


@pytest.fixture
def folder(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "text_encoder")
    return tmp_path / "text_encoder"


@pytest.fixture
def clip_folder(tmp_path):
    """A tiny CLIP text model with a byte-pair vocabulary of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz,"
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "ap", "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path / "clip"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\na p\n")
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder / "text_encoder"


def as_a_pipeline_encodes(model, tokenizer, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The context of the prompts and of the null prompt that StableDiffusionPipeline passes to its UNet."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,)),
        text_encoder=model,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            cross_attention_dim=32,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.encode_prompt(prompts, "cpu", 1, True)


@pytest.mark.slow
def test_the_import_is_light():
    """Importing transformers takes seconds, and is not needed to use or train a UNet alone."""
    heavy = {"transformers", "tokenizers", "huggingface_hub", "diffusers"}
    script = f"import sys, unet, vae; from text_encoder import TextEncoder; sys.exit(str({heavy} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stderr.strip() == "set()"


def test_a_new_bert(encoder):
    context = encoder(PROMPTS)
    assert context.shape == (3, 8, 32)
    assert encoder.context_dim == 32
    assert torch.equal(encoder.null_context(2)[1], encoder([""])[0])


def test_no_dropout_anywhere(encoder):
    """BERT's default of 0.1 would make features random during training."""
    encoder.train()
    assert torch.equal(encoder(PROMPTS), encoder(PROMPTS))
    assert encoder.model.config.hidden_dropout_prob == encoder.model.config.attention_probs_dropout_prob == 0


def test_padding_is_masked_inside_bert(encoder):
    """Masked tokens must not change the features of the real ones."""
    tokens, mask, _ = encoder.tokenize(["a red apple"])
    other = torch.where(mask, tokens, 7)
    real = mask[0]
    assert 0 < real.sum() < 8
    torch.testing.assert_close(encoder.encode(other, mask)[0, real], encoder.encode(tokens, mask)[0, real])
    encoder.use_attention_mask = False
    assert not torch.allclose(encoder.encode(other, mask)[0, real], encoder.encode(tokens, mask)[0, real], atol=1e-3)


def test_frozen_or_trainable(encoder):
    """The pooler stays frozen: it never receives a gradient, and DDP fails for trainable parameters without one."""
    encoder(PROMPTS).square().sum().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert not any("pooler" in name for name in trained)
    encoder.set_trainable(False)
    assert not encoder(PROMPTS).requires_grad
    encoder.set_trainable(True)
    assert {name for name, parameter in encoder.named_parameters() if parameter.requires_grad} == trained


def test_round_trip(encoder, folder):
    again = TextEncoder.from_pretrained(folder)
    assert not again.training
    assert (again.max_length, again.use_attention_mask) == (8, True)
    assert torch.equal(again(PROMPTS), encoder.eval()(PROMPTS))
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), encoder.state_dict().values(), strict=True)
    )
    assert TextEncoder.from_pretrained(folder, dtype=torch.bfloat16)(PROMPTS).dtype == torch.bfloat16


def test_stock_transformers_and_diffusers_open_what_we_save(encoder, folder):
    model, report = BertModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = BertTokenizerFast.from_pretrained(folder.parent / "tokenizer")
    assert tokenizer.model_max_length == 8
    lines = (folder.parent / "tokenizer" / "vocab.txt").read_text().splitlines()  # read by transformers 4
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))] == lines
    context, null = as_a_pipeline_encodes(model, tokenizer, PROMPTS)
    assert torch.equal(encoder.eval()(PROMPTS), context)
    assert torch.equal(encoder.null_context(3), null)


def test_clip(clip_folder):
    encoder = TextEncoder.from_pretrained(clip_folder)
    model, tokenizer = CLIPTextModel.from_pretrained(clip_folder), encoder.tokenizer
    context, null = as_a_pipeline_encodes(model, tokenizer, ["a red apple", "face"])
    assert encoder.max_length == 77
    assert not encoder.use_attention_mask
    assert torch.equal(encoder(["a red apple", "face"]), context)
    assert torch.equal(encoder.null_context(2), null)


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_files_of_2022_keep_position_ids(folder, clip_folder, kind):
    """Stable Diffusion 1.x and bert-base on the hub store them although they are not weights."""
    path = {"bert": folder, "clip": clip_folder}[kind]
    expected = TextEncoder.from_pretrained(path)(["a car"])
    names = {"bert": "embeddings.position_ids", "clip": "text_model.embeddings.position_ids"}
    change_weights(path, lambda w: w.update({names[kind]: torch.arange(8)[None]}))
    assert torch.equal(TextEncoder.from_pretrained(path)(["a car"]), expected)


def test_a_plain_bert_folder_as_on_the_hub(folder, tmp_path):
    """Model and tokenizer in one folder, no use_attention_mask, and heads for other tasks."""
    config = json.loads((folder / "config.json").read_text())
    del config["use_attention_mask"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "cls.predictions.bias": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(folder / file.name)
    encoder = TextEncoder.from_pretrained(folder)
    assert encoder.use_attention_mask
    assert encoder.max_length == 8
    assert TextEncoder.from_pretrained(folder, max_length=6)(["a red apple"]).shape == (1, 6, 32)


def test_overflow_is_reported(encoder):
    with pytest.warns(
        TokenOverflowWarning,
        match=r"1 of 2 prompts are longer than 8 tokens and are cut off; the longest loses its last \d+: '",
    ):
        tokenized = encoder.tokenize([LONG, "a car"])
    assert tokenized.tokens.shape == (2, 8)
    assert tokenized.lost[0] == len(encoder.tokenizer(LONG)["input_ids"]) - 8
    assert tokenized.lost[1] == 0
    assert tokenized.tokens[0, -1] == encoder.tokenizer.sep_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.tokenize(PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a red apple", "prompts='a red apple': expected a list of at least one string"),
        ([], r"prompts=\[\]: expected a list"),
        (None, "prompts=None: expected a list"),
        ({"a": 1}, "expected a list"),
        (iter(["a"]), "expected a list"),
        ([None], "prompt None: expected a string"),
        (["a", 1], "prompt 1: expected a string"),
        (["\ud800"], r"prompt '\\ud800': not valid Unicode"),
    ],
)
def test_wrong_prompts(encoder, prompts, message):
    with pytest.raises(TextEncoderError, match=message):
        encoder(prompts)


def test_odd_but_valid_prompts(encoder):
    assert encoder(["\0", "🍎🍏", " \n\t ", "ا苹é"]).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width=0"),
        ({"num_layers": True}, "num_layers=True"),
        ({"num_heads": 2.0}, r"num_heads=2\.0"),
        ({"width": 30, "num_heads": 4}, "num_heads=4 does not divide width=30"),
    ],
)
def test_wrong_config(options, message):
    with pytest.raises(TextEncoderError, match=message):
        TextEncoderConfig(**options)


def test_tokenizer_and_model_must_fit(encoder, tokenizer):
    with pytest.raises(TextEncoderError, match="max_length=9: expected 3 to 8, the model's limit"):
        TextEncoder(encoder.model, tokenizer, 9)
    with pytest.raises(TextEncoderError, match="max_length='8'"):
        TextEncoder(encoder.model, tokenizer, "8")
    with pytest.raises(TextEncoderError, match="model_max_length is not set"):
        TextEncoder.new(TextEncoderConfig(), BertTokenizerFast())
    larger = train_tokenizer([*CAPTIONS, *["quite another zebra"] * 9], vocab_size=200, max_length=8)
    with pytest.raises(TextEncoderError, match=r"the tokenizer has \d+ tokens, but the model only"):
        TextEncoder(encoder.model, larger, 8)


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (lambda f: set_config(f, model_type="gpt2"), "model_type 'gpt2' is not supported; only bert"),
        (lambda f: set_config(f, auto_map={"AutoModel": "evil.Model"}), "'auto_map', which is not allowed"),
        (lambda f: set_config(f, trust_remote_code=True), "'trust_remote_code', which is not allowed"),
        (lambda f: set_config(f, _attn_implementation_internal="evil/kernel"), "which is not allowed"),
        (lambda f: set_config(f, hidden_size=64), "cannot be opened"),
        (lambda f: set_config(f, hidden_size="32"), r"config\.json: cannot be used \(.*'hidden_size'"),
        (lambda f: set_config(f, num_attention_heads=0), r"config\.json: cannot be used"),
        (lambda f: set_config(f, num_hidden_layers=1), "not part of this text encoder: 16 tensors: encoder"),
        (lambda f: set_config(f, num_hidden_layers=10**9), r"num_hidden_layers=1000000000; the file has only \d+"),
        (lambda f: set_config(f, num_hidden_layers=3), "lacks 16 tensors: encoder"),
        (lambda f: set_config(f, is_decoder=True), "'is_decoder', which is not allowed"),
        (lambda f: set_config(f, use_attention_mask="no"), "use_attention_mask='no': expected true or false"),
        (lambda f: set_config(f, model_type=["bert"]), "is not supported; only bert"),
        (lambda f: (f / "config.json").write_text("[1]"), r"config\.json: expected a JSON object, found list"),
        (lambda f: change_weights(f, lambda w: w.pop("embeddings.LayerNorm.weight")), "lacks 1 tensor: embeddings"),
        (
            lambda f: change_weights(f, lambda w: w.update({"embeddings.LayerNorm.bias": torch.zeros(5)})),
            "cannot be opened",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "damaged or not a safetensors file",
        ),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "never opened"),
        (lambda f: (f.parent / "tokenizer").rename(f.parent / "elsewhere"), "no tokenizer found; expected one of"),
        (lambda f: (f.parent / "tokenizer" / "tokenizer.json").write_text("{}"), "cannot be opened"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the same test ids in every process
)
def test_spoilt_folders(folder, spoil, message):
    spoil(folder)
    with pytest.raises(TextEncoderError, match=message) as caught:
        TextEncoder.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_saving_where_one_cannot(encoder, tmp_path):
    """transformers only logs that the path is a file, and writes nothing."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TextEncoderError, match="file: cannot be written"):
        encoder.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "no-such-bert", "", "x" * 5000])
def test_nothing_there(name):
    with pytest.raises(TextEncoderError, match=f"{name}: "):
        TextEncoder.from_pretrained(name)
