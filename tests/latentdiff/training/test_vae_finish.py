"""From the end of VAE training to the training cache: the same bits as step by step, with every picture read once."""

import copy
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentdiff.config import load_config
from latentdiff.data.cache import LatentCache
from latentdiff.data.readers import Source
from latentdiff.data.sources import open_source
from latentdiff.training import vae_finish
from latentdiff.training.launch import launch
from latentdiff.training.stages import make_caches, open_text_encoder
from latentdiff.training.vae import VAETraining, load_pixels
from latentdiff.training.vae_finish import finish_seconds, finish_vae
from vae import VAE
from vae.normalize import LatentStatistics, fold_statistics

COUNT = 70  # three batches of at most 32


class Counting(Source):
    """Counts what is read."""

    def read(self, index):
        self.counts[index] += 1
        return super().read(index)


@pytest.fixture
def run(tmp_path, pictures):
    overrides = [f"output={tmp_path}", f"data.source={pictures}", "precision=fp32", "threads=1", "trackers=[]"]
    return launch(load_config("debug", overrides))


@pytest.fixture
def sources(run):
    """The same 24 pictures again and again, and the held-out ones."""
    train, held_out = open_source(run.config.data)
    counting = Counting(
        train.table, train.reader, train.caption_columns, train.stamp, train.rows[np.arange(COUNT) % 24]
    )
    counting.counts = Counter()
    return counting, held_out


@pytest.fixture
def task(run, sources, tmp_path):
    return VAETraining(run, tmp_path / "train_vae", sources, VAE(run.config.vae.build(32)))


@pytest.fixture
def caches(run, sources, tmp_path):
    """Build the caches of the finished VAE."""

    def build():
        encoder = open_text_encoder(run.config, sources[1])
        return make_caches(run, sources, VAE.from_pretrained(tmp_path / "vae"), encoder)[0][0]

    return build


@torch.no_grad()
def finish_directly(vae, source, data, stride=1):
    """Fold the statistics of the pictures, which are encoded for that."""
    statistics, chosen = LatentStatistics(vae.config.latent_channels), range(0, len(source), stride)
    for start in range(0, len(chosen), 32):
        statistics.add(vae.posterior(load_pixels(source, chosen[start : start + 32], data)))
    fold_statistics(vae, statistics.mean, statistics.std)
    return vae.state_dict()


def same_rows(one, other):
    assert one.shards.folder.name == other.shards.folder.name  # the key
    assert one.good.all()
    return one.shards.column("moments").tobytes() == other.shards.column("moments").tobytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_finishing_and_caching_equal_encoding_again(run, task, sources, caches, tmp_path, workers):
    data, expected = run.config.data, finish_directly(copy.deepcopy(task.finish()[0]), sources[0], run.config.data)
    sources[0].counts.clear()
    finish_vae(task, replace(run, config=run.config.model_copy(update={"workers": workers})), tmp_path / "vae")
    found = VAE.from_pretrained(tmp_path / "vae").state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    folder = tmp_path / "cache" / "train-encodings"
    assert len(list(folder.iterdir())) == 1
    quick = caches()
    # With a worker, the counts are in another process.
    assert sources[0].counts == (Counter() if workers else Counter(range(COUNT)))
    assert not folder.exists()
    direct = LatentCache(tmp_path / "direct", sources[0], VAE.from_pretrained(tmp_path / "vae"), data, flips=data.flip,
                         memo=tmp_path / "memo.json")  # fmt: skip
    direct.build()
    assert same_rows(quick, direct)
    again = caches()
    assert same_rows(again, direct)


def test_what_was_finished_is_not_read_again(run, task, sources, tmp_path):
    report = finish_vae(task, run, tmp_path / "vae")
    sources[0].counts.clear()
    assert finish_vae(task, run, tmp_path / "again") == report
    assert not sources[0].counts
    one, other = (VAE.from_pretrained(tmp_path / name).state_dict() for name in ("vae", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_of_very_many_pictures_some_are_measured(run, task, sources, caches, tmp_path, monkeypatch):
    """The cache then encodes all by itself, with flips."""
    monkeypatch.setattr(vae_finish, "MAX_STATISTICS_IMAGES", 30)
    expected = finish_directly(copy.deepcopy(task.finish()[0]), sources[0], run.config.data, stride=3)
    sources[0].counts.clear()
    report = finish_vae(task, run, tmp_path / "vae")
    assert sources[0].counts == Counter(range(0, COUNT, 3))
    assert report["pictures"] == len(range(0, COUNT, 3))
    found = VAE.from_pretrained(tmp_path / "vae").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(caches().good) == COUNT
    assert not (tmp_path / "cache" / "train-encodings").exists()


def test_damaged_encodings_are_computed_again(run, task, sources, caches, tmp_path):
    finish_vae(task, run, tmp_path / "vae")
    first = caches()
    rows = first.shards.column("moments").tobytes()
    finish_vae(task, run, tmp_path / "vae")
    path = next((tmp_path / "cache" / "train-encodings").glob("*/shard-00000.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3000] ^= 1
    path.write_bytes(data)
    for path in (tmp_path / "cache" / "train-latents").glob("*/shard*"):
        path.unlink()
    assert caches().shards.column("moments").tobytes() == rows


def test_an_estimate_of_the_time_changes_nothing(run, task, tmp_path):
    before = json.dumps([str(path) for path in sorted(tmp_path.rglob("*"))])
    weights = {name: tensor.clone() for name, tensor in task.inner.state_dict().items()}
    assert 0 < finish_seconds(task, run) < 60
    assert json.dumps([str(path) for path in sorted(tmp_path.rglob("*"))]) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in task.inner.state_dict().items())
    assert task.inner.training
    assert all(tensor.requires_grad for name, tensor in task.inner.named_parameters() if name.startswith("vae"))


def test_the_finished_vae(uninterrupted, pictures):
    """Mean 0 and std 1 of the latents, measured again; the decoder's scale in the metadata; the same in diffusers."""
    import math

    import diffusers
    from safetensors import safe_open

    from latentdiff.config import load_config
    from latentdiff.data.cache import read_pixels, to_pixels
    from latentdiff.data.sources import open_source
    from vae import VAE

    data = load_config("debug", [f"data.source={pictures}"]).data
    source, _ = open_source(data)
    pixels = torch.cat([to_pixels(torch.from_numpy(read_pixels(source, index, data))[None]) for index in range(24)])
    folder = uninterrupted("fp32") / "vae"
    vae = VAE.from_pretrained(folder)
    with torch.no_grad():
        posterior = vae.latent_posterior(pixels)
        draws = torch.cat([posterior.sample() for _ in range(200)])
        errors = torch.stack(
            [(pixels - vae(pixels, torch.randn_like(posterior.mean))[0]).abs().mean() for _ in range(20)]
        )
    assert draws.mean((0, 2, 3)).abs().max() < 0.02
    assert (draws.std((0, 2, 3)) - 1).abs().max() < 0.02
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["decoder_likelihood"] == "laplace"
    assert math.isclose(math.exp(float(facts["decoder_log_scale"])), float(errors.mean()), rel_tol=0.05)
    kept = {name: facts[name] for name in ("decoder_likelihood", "decoder_log_scale")}
    assert VAE.from_pretrained(folder.parent / "model" / "vae").facts == kept
    theirs = diffusers.AutoencoderKL.from_pretrained(folder)
    assert theirs.config.scaling_factor == 1.0
    assert torch.allclose(theirs.encode(pixels).latent_dist.mean, posterior.mean, atol=1e-5)
    report = json.loads((folder / "report.json").read_text())
    assert report["half_precision"]["bf16"] < 60
    assert max(abs(value - 1) for value in report["std"]) < 1e-6
