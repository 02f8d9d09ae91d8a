"""Single files in the original layout: round trips, diffusers, configs inferred from shapes, and bad files."""

import errno
import json
import pickle
import struct
from collections.abc import Iterable

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from latentdiff import LatentDiffError
from latentdiff.files import single_file
from latentdiff.files.names import STABLE_DIFFUSION, infer_plan, make_layout, unet_names, vae_names
from latentdiff.files.single_file import read_single_file, write_single_file
from text_encoder import TextEncoder, TextEncoderConfig, train_tokenizer
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

PROMPTS = ["a red apple", "", "the smiling face"]
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.001,
    "beta_end": 0.03,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
UNET_KEY = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"


def some_quick(cases: Iterable[tuple], quick: list[tuple]) -> list:
    """Leave all cases but the quick ones to the slow suite."""
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def new_clip(folder, **changes) -> TextEncoder:
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "ap", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\na p\n")
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1}
    ids = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 1}
    config = CLIPTextConfig(**sizes, **ids, **{"num_hidden_layers": 2, **changes})
    return TextEncoder(CLIPTextModel(config), tokenizer, 77, use_attention_mask=False).eval()


def new_bert() -> TextEncoder:
    tokenizer = train_tokenizer(["a red apple", "the smiling face"] * 3, vocab_size=80, max_length=12)
    return TextEncoder.new(TextEncoderConfig(width=16, num_layers=2, num_heads=2), tokenizer).eval()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """Folder of the CLIP tokenizer."""
    return tmp_path_factory.mktemp("clip") / "tokenizer"


@pytest.fixture(scope="module")
def encoders(clip_folder):
    torch.manual_seed(0)
    return {"bert": new_bert(), "clip": new_clip(clip_folder)}


def new_model(encoder, levels=2, layers=1, *, groups=4, attention=None, sample_size=8, vae=None, **changes) -> dict:
    """Return all parts of a model, with random weights."""
    widths = (groups, *(2 * groups,) * (levels - 1))
    attention = tuple(range(levels - 1)) if attention is None else attention
    unet = UNet(
        UNetConfig(
            block_out_channels=widths,
            layers_per_block=layers,
            attention_levels=attention,
            context_dim=encoder.context_dim,
            norm_groups=groups,
            sample_size=sample_size,
            **{"num_heads": 2, **changes},
        )
    )
    shape = {"block_out_channels": widths, "layers_per_block": layers, "norm_groups": groups, "scale_factor": 0.9}
    parts = {"vae": VAE(VAEConfig(**{**shape, "sample_size": 64, **(vae or {})})), "unet": unet}
    for model in parts.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return {**{name: model.eval() for name, model in parts.items()}, "text_encoder": encoder, "scheduler": SCHEDULER}


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same(found, parts):
    """Compare the parts read from a file with the model written to it."""
    for model, expected in ((found.vae, parts["vae"]), (found.unet, parts["unet"])):
        assert model.config == expected.config
        assert_same_weights(model, expected)
        assert not model.training
    assert_same_weights(found.text_encoder.model, parts["text_encoder"].model)
    assert_same_prompts(found.text_encoder, parts["text_encoder"])


@torch.no_grad()
def assert_same_prompts(encoder, expected):
    assert torch.equal(encoder.tokenize(PROMPTS).tokens, expected.tokenize(PROMPTS).tokens)
    assert torch.equal(encoder(PROMPTS), expected(PROMPTS))


@pytest.mark.parametrize(
    ("levels", "layers", "kind"),
    some_quick(
        [(levels, layers, kind) for levels in (2, 3, 4) for layers in (1, 2) for kind in ("bert", "clip")],
        [(2, 1, "clip"), (3, 1, "bert"), (3, 2, "clip"), (4, 2, "bert")],
    ),
)
def test_round_trip(encoders, tmp_path, levels, layers, kind):
    """From diffusers folders to one file and back, bit for bit."""
    parts = new_model(encoders[kind], levels, layers)
    for name in ("vae", "unet", "text_encoder"):
        parts[name].save_pretrained(tmp_path / name)
        parts[name] = type(parts[name]).from_pretrained(tmp_path / name)
    write_single_file(tmp_path / "model.safetensors", **parts)
    found = read_single_file(tmp_path / "model.safetensors")
    assert_same(found, parts)
    assert found.scheduler == SCHEDULER
    assert found.text_encoder.max_length == parts["text_encoder"].max_length
    assert found.text_encoder.use_attention_mask == (kind == "bert")


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": ()},
        {"attention": (0, 2), "layers": 2, "transformer_layers": 2, "num_heads": (1, 2, 4)},
        {"attention": (2,), "linear_projection": True, "upcast_attention": True},
        {"levels": 1, "attention": (0,)},
        {
            "vae": {
                "attention_levels": (1, 2),
                "mid_attention": False,
                "quant_convs": (True, False),
                "shift_factor": 0.5,
            }
        },
        {"vae": {"block_out_channels": (8,), "latent_channels": 3, "force_upcast": True}, "in_channels": 9},
    ],
    ids=str,
)
def test_other_topologies(encoders, tmp_path, changes):
    parts = new_model(encoders["bert"], **{"levels": 3, **changes})
    write_single_file(tmp_path / "model.safetensors", **parts)
    assert_same(read_single_file(tmp_path / "model.safetensors"), parts)
    for names in (unet_names(parts["unet"].config), vae_names(parts["vae"].config)):
        assert len(set(names.values())) == len(names)


@pytest.fixture
def model(encoders):
    vae = {"scale_factor": 0.18215, "sample_size": 512}
    return new_model(encoders["clip"], 4, 2, groups=32, num_heads=8, sample_size=64, vae=vae)


@pytest.fixture
def path(model, tmp_path):
    """A file with the topology of Stable Diffusion 1."""
    write_single_file(tmp_path / "model.safetensors", **model)
    return tmp_path / "model.safetensors"


def test_the_layout_of_the_original(path):
    tensors = load_file(path)
    assert tensors["first_stage_model.decoder.mid.attn_1.proj_out.weight"].shape == (64, 64, 1, 1)
    assert tensors["model.diffusion_model.output_blocks.5.2.conv.weight"].shape == (64, 64, 3, 3)
    assert "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias" in tensors
    assert tensors["betas"].dtype == tensors["alphas_cumprod"].dtype == torch.float32
    assert torch.equal(tensors["alphas_cumprod"][-1], torch.tensor(0.0))  # zero terminal SNR
    header = read_header(path)["__metadata__"]
    assert header["modelspec.prediction_type"] == "v"
    assert header["modelspec.resolution"] == "512x512"
    assert header["modelspec.title"] == "model"


def test_diffusers_reads_it(path, model, tmp_path):
    model["unet"].save_pretrained(tmp_path / "configs" / "unet")
    model["vae"].save_pretrained(tmp_path / "configs" / "vae")
    options = {"config": str(tmp_path / "configs"), "local_files_only": True}
    assert_same_weights(UNet2DConditionModel.from_single_file(str(path), subfolder="unet", **options), model["unet"])
    assert_same_weights(AutoencoderKL.from_single_file(str(path), subfolder="vae", **options), model["vae"])


def test_dtype_and_metadata(path, model):
    metadata = {"trained_on": "apples", "modelspec.title": "Apples"}
    write_single_file(path, **model, dtype=torch.bfloat16, metadata=metadata)
    assert load_file(path)[UNET_KEY].dtype == torch.bfloat16
    assert read_header(path)["__metadata__"].items() > metadata.items()
    assert read_single_file(path).unet.conv_in.weight.dtype == torch.float32
    half = read_single_file(path, dtype=torch.bfloat16)
    weights = (half.unet.conv_in.weight, half.vae.encoder.conv_in.weight, next(half.text_encoder.parameters()))
    assert {tensor.dtype for tensor in weights} == {torch.bfloat16}


def test_tensors_are_copies(path):
    """A memory-mapped tensor would change with its file, or kill the process."""
    unet = read_single_file(path).unet
    before = unet.conv_out.weight.clone()
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x7f" * (path.stat().st_size // 2))
    assert torch.equal(unet.conv_out.weight, before)


# Third-party files, without our header.


def strip(path, extra=None, metadata=None):
    save_file({**load_file(path), **(extra or {})}, path, metadata=metadata)


def test_configs_from_shapes(path, model, clip_folder):
    ignored = {
        "model_ema.decay": torch.tensor(0.9),
        "sqrt_one_minus_alphas_cumprod": torch.zeros(9),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    strip(path, ignored)
    with pytest.raises(LatentDiffError, match=r"has no tokenizer: give the folder of its CLIP tokenizer as tokenizer="):
        read_single_file(path)
    found = read_single_file(path, tokenizer=clip_folder)
    assert_same(found, model)
    assert found.scheduler == {**STABLE_DIFFUSION, "prediction_type": "epsilon"}
    strip(
        path, {"scale_factor": torch.tensor(0.5)}, {"modelspec.prediction_type": "v", "modelspec.resolution": "768x768"}
    )
    found = read_single_file(path, tokenizer=clip_folder)
    assert found.scheduler["prediction_type"] == "v_prediction"
    assert (found.vae.config.scale_factor, found.unet.config.sample_size) == (0.5, 96)
    strip(path, metadata={"modelspec.prediction_type": "score"})
    with pytest.raises(LatentDiffError, match=r"prediction_type='score' is not supported; choose one of epsilon"):
        read_single_file(path, tokenizer=clip_folder)


@pytest.mark.parametrize(
    ("levels", "linear"),
    some_quick([(levels, linear) for levels in (1, 2, 3) for linear in (False, True)], [(1, False), (3, True)]),
)
def test_other_levels_from_shapes(encoders, tmp_path, clip_folder, levels, linear):
    sizes = {"groups": 32, "attention": (levels - 1,), "sample_size": 512 // 2 ** (levels - 1)}
    settings = {"linear_projection": linear, "upcast_attention": linear, "num_heads": None if linear else 8}
    vae = {"attention_levels": (0,), "scale_factor": 0.18215, "sample_size": 512}
    parts = new_model(encoders["clip"], levels, 1, **sizes, vae=vae, **settings)
    write_single_file(tmp_path / "model.safetensors", **parts)
    strip(tmp_path / "model.safetensors")
    assert_same(read_single_file(tmp_path / "model.safetensors", tokenizer=clip_folder), parts)


def test_stable_diffusion_from_shapes():
    """At full size, without weights."""
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    expected = UNetConfig(sample_size=64), VAEConfig(sample_size=512)
    with torch.device("meta"):
        unet, vae, text = UNet(expected[0]), VAE(expected[1]), CLIPTextModel(clip)
    shapes = {
        names[name]: list(tensor.shape)
        for part, names in make_layout(unet, vae, text, "clip_text_model")
        for name, tensor in part.state_dict().items()
    }
    plan = infer_plan({}, shapes, 0.18215)
    assert (plan.unet, plan.vae) == expected
    assert {**clip.to_dict(), **plan.text} == clip.to_dict()


def test_open_clip(tmp_path):
    """Stable Diffusion 2's text encoder: three projections in one tensor, and an unused last layer."""
    encoder = new_clip(tmp_path / "tokenizer", hidden_act="gelu")
    file = tmp_path / "model.safetensors"
    write_single_file(file, **new_model(encoder, groups=32, num_heads=1, linear_projection=True))
    old, new = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
    names = {
        "embeddings.token_embedding.": "token_embedding.",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.": "ln_final.",
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm": "ln_",
        "self_attn.out": "attn.out",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    tensors = {f"{new}text_projection": torch.zeros(64, 64), f"{new}logit_scale": torch.zeros(())}
    for name, tensor in load_file(file).items():
        if name.startswith(old):
            for theirs, openclip in names.items():
                name = name.replace(theirs, openclip)
            name = name.replace(old, new)
        tensors[name] = tensor
    for kind in ("weight", "bias"):
        for layer in range(2):
            block = f"{new}transformer.resblocks.{layer}"
            thirds = [tensors.pop(f"{block}.self_attn.{x}_proj.{kind}") for x in "qkv"]
            tensors[f"{block}.attn.in_proj_{kind}"] = torch.cat(thirds)
    first = {name: tensor for name, tensor in tensors.items() if "resblocks.0." in name}
    save_file(
        {**tensors, **{name.replace("resblocks.0.", "resblocks.2."): first[name].clone() for name in first}}, file
    )
    found = read_single_file(file, tokenizer=tmp_path / "tokenizer")
    assert_same_weights(found.text_encoder.model, encoder.model)
    assert_same_prompts(found.text_encoder, encoder)


@pytest.mark.filterwarnings("ignore")  # diffusers' old class under a new transformers
@pytest.mark.parametrize("stripped", [False, True])
def test_ldm_text2im(tmp_path, stripped):
    tokenizer = train_tokenizer(["a red apple", "the face"] * 3, vocab_size=80, max_length=77)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = {"encoder_layers": 2, "encoder_ffn_dim": 64, "encoder_attention_heads": 8, "head_dim": 2, "d_model": 32}
    bert = LDMBertModel(LDMBertConfig(vocab_size=len(tokenizer), dropout=0.0, **sizes))
    encoder = TextEncoder(bert, tokenizer, 77, use_attention_mask=False).eval()
    parts = new_model(
        encoder, groups=32, num_heads=8, sample_size=128, vae={"scale_factor": 0.18215, "sample_size": 256}
    )
    file = tmp_path / "model.safetensors"
    write_single_file(file, **parts)
    names = {name.removeprefix("cond_stage_model.transformer.") for name in load_file(file)}
    assert names > {"token_emb.weight", "pos_emb.emb.weight", "norm.bias", "to_logits.bias"}
    assert names > {"attn_layers.layers.3.1.net.0.0.bias", "attn_layers.layers.2.1.to_out.bias"}
    if stripped:
        strip(file)
    assert_same(read_single_file(file, tokenizer=tmp_path / "tokenizer" if stripped else None), parts)


# Files that are rejected.


def read_header(path) -> dict:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])


def write_header(path, header: str):
    """Replace the header and keep the data."""
    raw = path.read_bytes()
    body = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + body)


def edit(path, change):
    header = read_header(path)
    change(header)
    write_header(path, json.dumps(header))


def assert_rejected(path, message):
    with pytest.raises(LatentDiffError, match=message) as caught:
        read_single_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def small(encoders, tmp_path):
    write_single_file(tmp_path / "small.safetensors", **new_model(encoders["bert"]))
    return tmp_path / "small.safetensors"


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.safetensors"])
@pytest.mark.parametrize("protocol", [2, 4, "zip"])
def test_pickles(tmp_path, name, protocol):
    file = tmp_path / name
    if protocol == "zip":
        torch.save({"state_dict": {}}, file)
    else:
        file.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    assert_rejected(file, r"a pickle, which can run code.*convert it to safetensors: python -c")


def test_damaged_files(small):
    raw = small.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    for size in (0, 5, 8, 100, 8 + length, len(raw) - 1):
        small.write_bytes(raw[:size])
        assert_rejected(small, "damaged or not a safetensors file")
    small.write_bytes(raw + b"\0")
    assert_rejected(small, "damaged or not a safetensors file")
    for header in ("[" * 100_000, "{", "[]", '{"a": 1}', "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")):
        small.write_bytes(raw)
        write_header(small, header)
        assert_rejected(small, "damaged or not a safetensors file")
    with pytest.raises(LatentDiffError, match=r"nowhere\.safetensors: no such file"):
        read_single_file(small.with_name("nowhere.safetensors"))


def test_header_bomb(small):
    """The length alone is rejected, before any of the header is read."""
    with small.open("r+b") as file:
        file.write(struct.pack("<Q", 33 * 2**20))
        file.truncate(40 * 2**20)  # sparse
    assert_rejected(small, r"header of 34603008; expected at most 33554432")


def test_duplicate_keys(small):
    header = json.dumps(read_header(small))
    write_header(small, f'{header[:-1]}, "{UNET_KEY}": {json.dumps(read_header(small)[UNET_KEY])}}}')
    assert_rejected(small, f"its header has the key '{UNET_KEY}' twice")
    write_header(small, header.replace('"format": "pt"', '"format": "pt", "format": "pt"'))
    assert_rejected(small, "its header has the key 'format' twice")


def test_offsets(small):
    offsets = read_header(small)[UNET_KEY]["data_offsets"]
    for wrong in ([0, 16], [offsets[0] + 4, offsets[1] + 4], [offsets[1], offsets[0]], [2**62, 2**62 + 16], [-1, 15]):
        edit(small, lambda header, wrong=wrong: header[UNET_KEY].update(data_offsets=wrong))
        assert_rejected(small, "damaged or not a safetensors file")


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=read_header(path)["__metadata__"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UNET_KEY), f"lacks 1 tensor: {UNET_KEY}"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("first")],
            r"lacks \d+ tensors: first_stage_model\..*, …",
        ),
        (lambda t: t.update(more=torch.ones(1)), "unexpected for this model: 1 tensor: more"),
        (lambda t: t.update({UNET_KEY: torch.ones(5)}), rf"{UNET_KEY} has shape \[5\]; the config says \[4\]"),
        (lambda t: t.update({UNET_KEY: torch.ones(4, dtype=torch.int64)}), f"{UNET_KEY} is I64; expected one of BF16"),
    ],
)
def test_tensors_and_config_disagree(small, change, message):
    change_tensors(small, change)
    assert_rejected(small, message)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"block_out_channels": [4, 2**40]}, "block_out_channels=1099511627776"),
        ("unet", {"block_out_channels": [4, 400_000]}, r"has shape .*; the config says"),
        ("vae", {"latent_channels": 0}, "latent_channels=0"),
        ("text_encoder", {"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000; the file has only \d+"),
        ("text_encoder", {"hidden_size": "big"}, "its text encoder's config: cannot be used \\(.*'hidden_size'"),
        ("text_encoder", {"model_type": "llama"}, "model_type 'llama' is not supported; only bert"),
        ("text_encoder", {"auto_map": {"AutoModel": "evil.Model"}}, "'auto_map', which is not allowed"),
        ("scheduler", {"prediction_type": "score"}, "its scheduler: prediction_type='score' is not supported"),
        ("tokenizer", {"../../evil": "text"}, r"latentdiff\.tokenizer in its header has '\.\./\.\./evil'"),
        ("tokenizer", {"tokenizer.json": "{"}, "cannot be opened"),
    ],
)
def test_damaged_headers(small, part, change, message):
    key = f"latentdiff.{part}"

    def damage(header):
        header["__metadata__"][key] = json.dumps({**json.loads(header["__metadata__"][key]), **change})

    edit(small, damage)
    assert_rejected(small, message)


def test_headers_that_lack_a_part(small):
    edit(small, lambda header: header["__metadata__"].pop("latentdiff.vae"))
    assert_rejected(small, r"latentdiff\.vae in its header is None; expected an object")
    edit(small, lambda header: header["__metadata__"].update({"latentdiff.vae": "{"}))
    assert_rejected(small, r"latentdiff\.vae in its header is not JSON")


def test_other_kinds_of_models(small, tmp_path):
    strip(small)
    assert_rejected(small, "its text encoder is neither CLIP nor LDM's BERT")
    save_file({"lora.weight": torch.ones(1)}, small)
    assert_rejected(small, r"has no tensors named model\.diffusion_model")
    names = (
        UNET_KEY,
        "first_stage_model.x",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    )
    save_file({name: torch.ones(1) for name in names}, small)
    assert_rejected(small, "not a complete latent diffusion model: no usable tensor")


def test_full_disk(small, encoders, monkeypatch):
    """The old file stays, and no partial file is left."""
    before = small.read_bytes()

    def save(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(single_file, "save_file", save)
    for path in (small, small.with_name("new.safetensors")):
        with pytest.raises(LatentDiffError, match=rf"{path.name}: cannot be written \(.*No space left"):
            write_single_file(path, **new_model(encoders["bert"]))
    assert [file.name for file in small.parent.iterdir()] == [small.name]
    assert small.read_bytes() == before


def test_unsupported_outputs(encoders, tmp_path):
    with pytest.raises(LatentDiffError, match=r"model\.ckpt: expected a name ending in \.safetensors"):
        write_single_file(tmp_path / "model.ckpt", **new_model(encoders["bert"]))
    with pytest.raises(LatentDiffError, match="prediction_type='mean' is not supported"):
        write_single_file(
            tmp_path / "model.safetensors", **{**new_model(encoders["bert"]), "scheduler": {"prediction_type": "mean"}}
        )
    assert not list(tmp_path.iterdir())
