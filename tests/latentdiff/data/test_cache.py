"""The caches hold the VAE's posteriors, and never those of another VAE, picture or transform."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffError
from latentdiff.data.batches import LatentBatches, ValidationBatches
from latentdiff.data.cache import LatentCache, TextCache, read_pixels
from latentdiff.data.order import BatchPlan
from latentdiff.data.pictures import to_pixels
from latentdiff.data.sources import open_source
from text_encoder import TextEncoder, TextEncoderConfig, train_tokenizer
from vae import VAE, VAEConfig


@pytest.fixture
def vae():
    return VAE(VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, mid_attention=False)).eval()


@pytest.fixture
def folder(tmp_path, write):
    """Nine pictures with captions."""
    names = [f"{number}.png" for number in range(9)]
    write(tmp_path / "pictures", *names)
    lines = [json.dumps({"file_name": name, "text": [f"picture {name[0]}", f"number {name[0]}"]}) for name in names]
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "pictures"


@pytest.fixture
def source(config, folder):
    return open_source(config(folder, validation_share=0.2))[0]


@pytest.fixture
def encoder():
    tokenizer = train_tokenizer(["picture number 0 1 2 3 4 5 6 7 8"] * 2, vocab_size=100, max_length=6)
    return TextEncoder.new(TextEncoderConfig(16, 1, 2), tokenizer).eval()


@pytest.fixture
def latents(tmp_path, vae, config, folder):
    def make(**settings):
        source = open_source(config(folder, validation_share=0.2))[0]  # opened again, as in every run
        cache = LatentCache(tmp_path / "cache", source, vae, config(folder, **settings), flips=True,
                            memo=tmp_path / "memo.json")  # fmt: skip
        cache.build()
        return cache

    return make


def test_moments_equal_the_vae_posterior(latents, source, vae, config, folder):
    cache = latents()
    for index in range(len(source)):
        pixels = to_pixels(torch.from_numpy(read_pixels(source, index, config(folder)))[None])
        for flip in (False, True):
            with torch.no_grad():
                posterior = vae.latent_posterior(pixels.flip(3) if flip else pixels)
            mean, logvar = cache.moments(index, flip)
            assert np.allclose(mean, posterior.mean[0], atol=2e-3)  # stored as float16
            assert np.allclose(logvar, posterior.logvar[0], atol=2e-3)


def test_to_pixels_spans_minus_one_to_one():
    images = (
        torch.tensor([0, 255], dtype=torch.uint8)
        .view(1, 1, 2, 1)
        .expand(1, 2, 2, 3)
        .clone(memory_format=torch.contiguous_format)
    )
    pixels = to_pixels(images)
    assert pixels.shape == (1, 3, 2, 2)
    assert pixels[0, 0, 0].tolist() == [-1.0, 1.0]
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_one_weight_changes_the_key(latents, vae):
    before = latents().shards.folder
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert latents().shards.folder != before


def test_one_picture_changes_the_key(latents, source, folder):
    before = latents().shards.folder
    path = folder / source.name(2)
    Image.new("RGB", (20, 16), "red").save(path)
    assert latents().shards.folder != before


def test_a_changed_picture_with_the_same_size_and_mtime_goes_unnoticed(latents, source, folder):
    """The memo saves reading all pictures at every start; after `touch` the change is noticed."""
    before = latents(max_broken=1.0).shards.folder
    path = folder / source.name(2)
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert latents(max_broken=1.0).shards.folder == before
    os.utime(path)
    assert latents(max_broken=1.0).shards.folder != before


@pytest.mark.parametrize("settings", [{"image_size": 12}, {"background": (0, 0, 0)}, {"max_pixels": 1000}])
def test_another_transform_changes_the_key(latents, settings):
    assert latents().shards.folder != latents(**settings).shards.folder


def test_a_broken_picture_is_skipped_and_counted(latents, source, folder):
    (folder / source.name(1)).write_bytes(b"not a picture")
    with pytest.raises(LatentDiffError, match=r"1 of \d pictures are broken .* data.max_broken=0.01"):
        latents()
    cache = latents(max_broken=0.5)
    assert cache.good.tolist() == [index != 1 for index in range(len(source))]


def test_text_features_equal_the_encoder_output(tmp_path, source, encoder):
    cache = TextCache(tmp_path / "text", source, encoder)
    cache.build()
    with torch.no_grad():
        for index in range(len(source)):
            for number, caption in enumerate(source.captions(index)):
                assert np.allclose(cache.features(index, number), encoder([caption])[0], atol=2e-3)
        assert np.allclose(cache.features(0, None), encoder([""])[0], atol=2e-3)


def test_one_text_weight_or_caption_changes_the_key(tmp_path, source, encoder, folder, config):
    before = TextCache(tmp_path / "text", source, encoder).shards.folder
    with torch.no_grad():
        next(encoder.model.parameters())[0, 0] += 1e-3
    changed = TextCache(tmp_path / "text", source, encoder).shards.folder
    assert changed != before
    text = (folder / "metadata.jsonl").read_text().replace("number", "the number")
    (folder / "metadata.jsonl").write_text(text)
    other = open_source(config(folder, validation_share=0.2))[0]
    assert TextCache(tmp_path / "text", other, encoder).shards.folder != changed


@pytest.fixture
def batches(source, config, folder, encoder, latents):
    def make(cached=True, dropout=0.0, rank=0, world=1, **settings):
        cache = latents(**settings) if cached else None
        return LatentBatches(source, config(folder, **settings), BatchPlan(8, rank, world), 5, (4, 8, 8),
                             num_timesteps=1000, caption_dropout=dropout, latents=cache, text=encoder)  # fmt: skip

    return make


def test_a_step_is_the_same_with_and_without_the_cache(batches, vae):
    """Sampling from the cached posterior equals encoding the picture in the step, up to float16 rounding."""
    cached, online = batches()[3], batches(cached=False)[3]
    with torch.no_grad():
        x0 = vae.latent_posterior(to_pixels(online.images)).reparameterize(online.posterior_noise)
    assert torch.allclose(cached.x0, x0, atol=5e-3)
    for ours, theirs in zip(
        (cached.noise, cached.t, *cached.text), (online.noise, online.t, *online.text), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_worker_processes_that_are_not_forked_get_the_same_batches(source, config, folder, tmp_path, encoder, latents):
    """Where workers are spawned, as on macOS, the dataset is pickled, without the models that a cache was made with."""
    text = TextCache(tmp_path / "text", source, encoder)
    text.build()
    dataset = LatentBatches(source, config(folder), BatchPlan(8), 5, (4, 8, 8), num_timesteps=1000,
                            caption_dropout=0.0, latents=latents(), text=text)  # fmt: skip
    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301 (our own)
    assert again.latents.vae is None
    assert again.features.encoder is None
    for ours, theirs in zip(dataset[2][:3], again[2][:3], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(dataset[2].text, again[2].text)


def test_processes_slice_the_global_batch(batches):
    whole, halves = batches()[4], [batches(rank=rank, world=2)[4] for rank in (0, 1)]
    for name in ("x0", "noise", "t"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves])), name
    assert torch.equal(whole.text.tokens, torch.cat([half.text.tokens for half in halves]))


def test_timesteps_are_stratified(batches):
    for number in range(5):
        t = batches()[number].t
        assert ((t * 8 // 1000) == torch.arange(8)).all()


def test_captions_are_sampled_and_dropped(batches, encoder):
    """Both captions and the empty prompt occur at their rates, within 4 standard errors."""
    rows = batches(dropout=0.25)
    tokens = torch.cat([rows[number].text.tokens for number in range(100)])
    empty, first = ((tokens == encoder.tokenize([text]).tokens).all(1) for text in ("", ""))
    assert abs(empty.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 800) ** 0.5
    word = encoder.tokenize(["picture"]).tokens[0, 1]
    share = (tokens == word).any(1)[~first].float().mean()
    assert abs(share - 0.5) < 4 * (0.25 / 600) ** 0.5


def test_a_broken_picture_is_replaced_by_the_next(batches, source, folder):
    before = batches()[0]
    (folder / source.name(1)).write_bytes(b"not a picture")
    for cached in (True, False):
        after = batches(cached=cached, max_broken=0.5)[0]
        assert torch.equal(before.t, after.t)
        assert torch.equal(before.noise, after.noise)
        assert after.text.tokens.shape == before.text.tokens.shape
    assert after.broken == [(source.name(1), "format")]


def test_validation_never_changes(batches):
    rows = batches()
    validation = ValidationBatches(rows, num_pictures=5, num_bands=4)
    assert len(validation) == 4
    for number in range(4):
        one, other = validation[number], validation[number]
        assert torch.equal(one.x0, other.x0)
        assert ((one.t * 4 // 1000) == validation.band(number)).all()
        assert len(one.t) == 5
