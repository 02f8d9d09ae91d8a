"""A trained model's folder in stock diffusers: the same pictures from the same noise."""

import warnings

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffError, LatentPipeline
from latentdiff.config import load_config
from latentdiff.diffusion.process import to_x0
from latentdiff.diffusion.samplers import make_rows, sample
from latentdiff.files.export import export_model, save_model
from latentdiff.files.open import open_model
from latentdiff.files.scheduler import scheduler_config
from text_encoder import TextEncoder, train_tokenizer
from unet import UNet
from vae import VAE


@pytest.fixture
def parts():
    config = load_config("debug")
    tokenizer = train_tokenizer(["a red apple", "a blue car"] * 2, vocab_size=100, max_length=16)
    encoder = TextEncoder.new(config.text_encoder.build(), tokenizer)
    unet = UNet(config.unet.build(4, encoder.context_dim, 16))
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return {"vae": VAE(config.vae.build(32)).eval(), "unet": unet.eval(), "text_encoder": encoder.eval(),
            "process": config.diffusion.process()}  # fmt: skip


def test_diffusers_gives_the_same_latents(parts, tmp_path, relative_error):
    """20 DDIM steps under zero terminal SNR, v prediction, guidance 1: the same latents."""
    save_model(tmp_path, **parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns that BertModel is not CLIPTextModel
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16)
    settings = {"height": 32, "width": 32, "num_inference_steps": 20, "guidance_scale": 1.0, "output_type": "latent"}
    theirs = pipeline("a red apple", latents=noise.clone(), **settings).images
    schedule = parts["process"].schedule
    with torch.no_grad():
        context = parts["text_encoder"](["a red apple"])

        def denoise(x, t):
            return to_x0(parts["unet"](x, torch.tensor(t), context), x, torch.tensor(t), "v", schedule)

        for step in sample(denoise, noise, make_rows("ddim", schedule, num_steps=20)):
            ours = step.x
    assert relative_error(ours, theirs) < 1e-3


def test_what_was_measured_of_the_decoder_is_kept(parts, tmp_path):
    """In folders, shards and single files, and through every conversion; nothing else of a header is."""
    facts = {"decoder_likelihood": "laplace", "decoder_log_scale": "-3.25"}
    parts["vae"].facts = facts
    save_model(tmp_path / "model", **parts, max_shard_bytes=20_000)
    assert len(list((tmp_path / "model/vae").glob("*.safetensors"))) > 1
    assert VAE.from_pretrained(tmp_path / "model/vae").facts == facts
    single = export_model(tmp_path / "model", tmp_path / "model.safetensors", single=True)
    folder = export_model(single, tmp_path / "again", dtype=torch.bfloat16)
    assert VAE.from_pretrained(folder / "vae").facts == open_model(single, device="cpu", dtype=None).vae.facts == facts
    tensors = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    save_file(tensors, folder / "vae/diffusion_pytorch_model.safetensors", {"format": "pt", "modelspec.title": "x"})
    assert VAE.from_pretrained(folder / "vae").facts == {}


def test_a_model_that_predicts_the_mean_is_ours_alone(parts, tmp_path):
    """It is saved, opened and drawn with like the x0 that its output estimates; none of it reaches diffusers."""
    drawn = {}
    for prediction in ("mean", "x0"):
        parts["process"] = parts["process"]._replace(prediction=prediction)
        save_model(tmp_path / prediction, **parts)
        pipe = LatentPipeline.from_pretrained(tmp_path / prediction)
        assert pipe.process.prediction == prediction
        *_, last = pipe.stream("a red apple", num_steps=5, guidance_scale=3, seed=0)
        drawn[prediction] = last.x
    assert torch.equal(drawn["mean"], drawn["x0"])
    refusal = r"diffusion.prediction=mean: diffusers has no scheduler for it"
    pipe = LatentPipeline.from_pretrained(tmp_path / "mean")
    for export in (
        lambda: export_model(tmp_path / "mean", tmp_path / "folder"),
        lambda: export_model(tmp_path / "mean", tmp_path / "model.safetensors", single=True),
        lambda: pipe("a red apple", sampler=diffusers.DDIMScheduler()),
        lambda: pipe.scheduler_config,
    ):
        with pytest.raises(LatentDiffError, match=refusal):
            export()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mean", "x0"]
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path / "mean", subfolder="scheduler")
    theirs.set_timesteps(5)
    with pytest.raises(ValueError, match="prediction_type given as mean"):
        theirs.step(torch.zeros(1), 999, torch.zeros(1))


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero", [True, False])
def test_the_schedule_is_the_same_in_diffusers(name, zero):
    settings = load_config("debug").diffusion.model_copy(update={"schedule": name, "zero_terminal_snr": zero})
    values = {key: value for key, value in scheduler_config(settings.process()).items() if key != "_class_name"}
    theirs = diffusers.DDIMScheduler(**values).alphas_cumprod.double()
    ours = settings.build().alpha_bar
    assert torch.allclose(ours, theirs, atol=2e-5)


def test_a_model_that_looks_back_is_ours_alone(parts, tmp_path):
    """It is saved, opened and drawn with; diffusers, which would leave its weights out, is given no chance to."""
    parts["unet"].add_trajectory_attention(2)
    for name, parameter in parts["unet"].named_parameters():
        if "trajectory" in name and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    saved = tmp_path / "saved"
    save_model(saved, **parts)
    pipe = LatentPipeline.from_pretrained(saved, dtype=torch.float32)  # bf16 where it is fast
    before = LatentPipeline(
        **{name: parts[name] for name in ("vae", "unet", "text_encoder")}, **parts["process"]._asdict()
    )
    one, other = ([*each.stream("a red apple", num_steps=5, seed=0)][-1].x for each in (pipe, before))
    assert torch.equal(one, other)
    for output, single in ((tmp_path / "folder", False), (tmp_path / "model.safetensors", True)):
        with pytest.raises(LatentDiffError, match=r"^unet.trajectory_attention=2: diffusers has no UNet that attends"):
            export_model(saved, output, single=single)
        assert not output.exists()
    for kind, folder in ((diffusers.DiffusionPipeline, saved), (diffusers.UNet2DConditionModel, saved / "unet")):
        with pytest.raises(ValueError, match="unknown mid_block_type : UNetMidBlock2DTrajectoryAttn"):
            kind.from_pretrained(folder, use_safetensors=True)
