"""Encodings are what encoding again would give, bit for bit, from a single read of every picture."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from latentdiff.data import encodings as module
from latentdiff.data.cache import (
    LatentCache,
    encode_batch_size,
    in_batches,
    pictures_digest,
    read_pixels,
    record_digest,
)
from latentdiff.data.encodings import Encodings
from latentdiff.data.order import random_stream
from latentdiff.data.pictures import to_pixels
from latentdiff.data.readers import Source
from latentdiff.data.shards import SHARD
from latentdiff.data.sources import open_source
from latentdiff.data.workers import choose_workers
from vae import VAE, VAEConfig
from vae.normalize import LatentStatistics, fold_statistics

COUNT = 150  # two shards of four batches of 32
CONFIG = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_groups": 4, "mid_attention": False}


class Counting(Source):
    """Writes down what is read, also in worker processes; one picture can be made to interrupt the program."""

    log, interrupt = None, None

    def read(self, index):
        if index == self.interrupt:
            raise KeyboardInterrupt
        with self.log.open("a") as file:
            file.write(f"{index}\n")
        return super().read(index)

    def counts(self):
        counts = Counter(map(int, self.log.read_text().split()))
        self.log.unlink()
        return counts


@pytest.fixture
def vae():
    return VAE(VAEConfig(**CONFIG)).eval()


@pytest.fixture
def source(tmp_path, write, config):
    """Nine pictures, again and again; one is broken, and one is missing."""
    names = [f"{number}.png" for number in range(11)]
    write(tmp_path / "pictures", *names)
    for name in names:
        (tmp_path / "pictures" / name).with_suffix(".txt").write_text("a picture")
    opened = open_source(config(tmp_path / "pictures", validation_share=0.1))[0]
    (tmp_path / "pictures" / opened.name(2)).write_bytes(b"not a picture")
    (tmp_path / "pictures" / opened.name(3)).unlink()
    rows = opened.rows[np.arange(COUNT) % len(opened)]
    counting = Counting(opened.table, opened.reader, opened.caption_columns, opened.stamp, rows)
    counting.log = tmp_path / "reads.txt"
    return counting


@pytest.fixture
def encodings(tmp_path, source, vae, config):
    def make(folder="encodings", build=True, **settings):
        settings = {"flips": True, "stride": 1, "seed": 3, "loss": "l1"} | settings
        made = Encodings(tmp_path / folder, source, vae, config("unused"), **settings)
        if build:
            made.build()
        return made

    return make


@pytest.fixture
def cache(tmp_path, source, vae, config):
    def make(folder, **settings):
        made = LatentCache(tmp_path / folder, source, vae, config("unused", max_broken=0.5), flips=True,
                           memo=tmp_path / "memo.json", **settings)  # fmt: skip
        made.build()
        return made

    return make


def contents(shards):
    """Everything that is stored, by file and byte."""
    return {path.name: path.read_bytes() for path in shards.folder.glob("*.safetensors")}


def fold(vae, encodings):
    statistics = LatentStatistics(vae.config.latent_channels)
    for outputs, _ in encodings.encoded(encodings.batches):
        statistics.add(vae.posterior_from(outputs[0]))
    fold_statistics(vae, statistics.mean, statistics.std)


@pytest.mark.parametrize("quant_convs", [(True, True), (False, False), (True, False)])
@torch.no_grad()
def test_the_posterior_is_what_the_folded_vae_encodes(tmp_path, source, config, quant_convs):
    vae = VAE(VAEConfig(**CONFIG, quant_convs=quant_convs)).eval()
    made = Encodings(tmp_path, source, vae, config("unused"), flips=True, stride=1, seed=0, loss="l1")
    made.build()
    fold(vae, made)
    for batch, (outputs, good) in zip(made.batches, made.encoded(made.batches), strict=True):
        assert good.tolist() == [index % 10 not in (2, 3) for index in batch]
        pictures = [read_pixels(source, index, made.config) if ok else np.zeros((16, 16, 3), np.uint8)
                    for index, ok in zip(batch, good, strict=True)]  # fmt: skip
        pixels = to_pixels(torch.from_numpy(np.stack(pictures)))
        for output, mirrored in zip(outputs, (pixels, pixels.flip(3)), strict=True):
            expected = vae.latent_posterior(mirrored)
            posterior = vae.scale_posterior(vae.posterior_from(output))
            assert torch.equal(posterior.mean, expected.mean)
            assert torch.equal(posterior.logvar, expected.logvar)


def test_the_cache_gets_the_same_bits_from_them(encodings, cache, vae):
    made = encodings()
    fold(vae, made)
    direct, quick = cache("direct"), cache("quick", encoded=made.encoded)
    assert direct.shards.folder.name == quick.shards.folder.name
    assert contents(direct.shards) == contents(quick.shards)
    assert direct.good.tolist() == quick.good.tolist() == [index % 10 not in (2, 3) for index in range(COUNT)]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(encodings, cache, workers):
    assert contents(encodings("some", workers=workers).shards) == contents(encodings("none").shards)
    assert contents(cache("more", workers=workers).shards) == contents(cache("nobody").shards)


def test_a_new_source_of_the_same_pictures_finds_them(encodings, vae, source, tmp_path, config):
    """Folding and reading again change nothing; another weight, seed or transform does."""
    made = encodings()
    fold(vae, made)
    assert encodings(build=False).shards.is_complete()
    assert not encodings(build=False, seed=4).shards.is_complete()
    assert not encodings(build=False, flips=False).shards.is_complete()
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert not encodings(build=False).shards.is_complete()
    encodings()
    assert not made.shards.folder.exists()  # those of another encoder are of no use


@pytest.mark.parametrize("workers", [0, 2])
def test_every_picture_is_read_once(encodings, source, tmp_path, workers):
    made = encodings(workers=workers)
    assert source.counts() == Counter(range(COUNT))
    encodings(workers=workers)
    assert not source.log.exists()
    memo = tmp_path / "written.json"
    assert record_digest(source, memo, made.summaries()) == pictures_digest(source, tmp_path / "read.json")
    assert memo.read_text() == (tmp_path / "read.json").read_text()
    source.counts()
    assert pictures_digest(source, memo) == json.loads(memo.read_text())["sha256"]
    assert not source.log.exists()


def test_an_interrupted_build_goes_on(encodings, source):
    source.interrupt = 140
    with pytest.raises(KeyboardInterrupt):
        encodings()
    assert source.counts() == Counter(range(140))
    source.interrupt = None
    again = encodings()
    assert source.counts() == Counter(range(128, COUNT))
    assert contents(again.shards) == contents(encodings("whole").shards)


@pytest.mark.parametrize(("loss", "most"), [("l1", 1000), ("l2", 1000), ("l1", 40)])
@torch.no_grad()
def test_the_decoders_error(encodings, vae, source, config, monkeypatch, loss, most):
    """Against a direct computation, one picture at a time; of at most so many pictures, evenly spread."""
    monkeypatch.setattr(module, "MAX_ERROR_PICTURES", most)
    errors = []
    for index in range(0, COUNT, math.ceil(COUNT / most)):
        if index % 10 not in (2, 3):
            pixels = to_pixels(torch.from_numpy(read_pixels(source, index, config("unused")))[None])
            noise = random_stream(3, "validation", 0, index).standard_normal((4, 8, 8), dtype=np.float32)
            difference = pixels - vae(pixels, torch.from_numpy(noise)[None])[0]
            errors.append(float((difference.abs() if loss == "l1" else difference.square()).mean()))
    assert encodings(loss=loss).decoder_error() == pytest.approx(np.mean(errors), rel=1e-6)


def test_some_of_very_many_pictures(encodings, source):
    made = encodings(stride=4)
    assert source.counts() == Counter(range(0, COUNT, 4))
    assert made.good.tolist() == [index % 10 not in (2, 3) for index in range(0, COUNT, 4)]


@pytest.mark.parametrize("size", [64, 256, 288, 320, 512, 768, 1024])
def test_the_batches_are_those_of_the_cache(tmp_path, source, vae, config, size):
    many = source.select(np.zeros(5000, dtype=np.int64))
    made = Encodings(tmp_path, many, vae, config("unused", image_size=size), flips=True, stride=1, seed=0, loss="l1")
    expected = [
        batch for shard in in_batches(range(5000), SHARD) for batch in in_batches(shard, encode_batch_size(size))
    ]
    assert made.batches == expected


def test_an_estimate_changes_nothing(encodings, source, tmp_path):
    before = torch.get_rng_state()
    made = encodings(build=False)
    assert 0 < made.seconds() < 60
    assert not (tmp_path / "encodings").exists()
    assert torch.equal(torch.get_rng_state(), before)
    assert source.counts().keys() == set(range(32))


def test_the_number_of_workers():
    """As many as wanted; else none for a few batches, and at least one for more."""
    assert [choose_workers(3, 2), choose_workers(3, 200), choose_workers(0, 2), choose_workers(0, 200)] == [3, 3, 0, 1]


def test_torchs_generator_stays_as_it_is(encodings):
    before = torch.get_rng_state()
    encodings(workers=1)
    assert torch.equal(torch.get_rng_state(), before)
