"""Drawn pictures are kept: a killed evaluation draws only what is missing, and never takes another's pictures."""

import copy
import dataclasses

import numpy as np
import pytest

from latentdiff import LatentDiffError, LatentPipeline
from latentdiff.evaluation import drawing, gallery
from latentdiff.evaluation import evaluate as report
from latentdiff.evaluation.kept import forget
from latentdiff.sampling.settings import SamplingSettings
from latentdiff.sections import DataConfig

SETTINGS = SamplingSettings(num_steps=2, seed=0, batch_size=2)


def test_a_killed_evaluation_goes_on(pipe, tmp_path, monkeypatch):
    """Killed in the third picture; the others are drawn afterwards, and all equal those of a run without a folder."""
    prompts, seeds = ["a cat", "a dog", "a cat", "an owl"], [0, 1, 2, 3]
    whole, calls = drawing.draw(pipe, prompts, seeds, SETTINGS, None), []

    def dies(self, features, seeds, settings):
        calls.append(len(seeds))
        for number, image in enumerate(original(features, seeds, settings)):
            if len(calls) == 1 and number == 2:
                raise KeyboardInterrupt
            yield image

    original = pipe.sample_images
    monkeypatch.setattr(type(pipe), "sample_images", dies)
    with pytest.raises(KeyboardInterrupt):
        drawing.draw(pipe, prompts, seeds, SETTINGS, tmp_path)
    images = drawing.draw(pipe, prompts, seeds, SETTINGS, tmp_path)
    assert calls == [4, 2]
    for image, expected in zip(images, whole, strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1  # batches differ by rounding
    assert len(list(tmp_path.rglob("*"))) == 1 + 4
    drawing.draw(pipe, prompts[:1], seeds[:1], SETTINGS.model_copy(update={"guidance_scale": 2.0}), tmp_path)
    assert calls == [4, 2, 1]


def test_what_is_computed_of_pictures_is_kept(pipe, tmp_path, monkeypatch):
    """Killed after the first of two batches; only the second is encoded afterwards, and all bits are the same."""
    random = np.random.default_rng(0)
    pictures, calls = [(index, random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for index in range(40)], []
    whole = gallery.embed(pipe.vae, iter(pictures), 64, reconstruct=True)

    def dies(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 3:  # pictures and their reconstructions make two
            raise KeyboardInterrupt
        return original(self, pixels)

    original = type(pipe.vae).latent_posterior
    monkeypatch.setattr(type(pipe.vae), "latent_posterior", dies)
    with pytest.raises(KeyboardInterrupt):
        gallery.embed(pipe.vae, iter(pictures), 64, reconstruct=True, folder=tmp_path)
    found = gallery.embed(pipe.vae, iter(pictures), 64, reconstruct=True, folder=tmp_path)
    assert calls == [32, 32, 8, 8, 8]
    for name in ("latents", "thumbnails", "quality"):
        assert getattr(found, name).equal(getattr(whole, name))
    assert found.pooled()[gallery.LATENTS].equal(whole.pooled()[gallery.LATENTS])
    assert found.reconstructed[gallery.LATENTS].equal(whole.reconstructed[gallery.LATENTS])
    assert found.statistics.state().equal(whole.statistics.state())
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-1])
    (tmp_path / "mine.txt").write_text("not of an evaluation")
    gallery.embed(pipe.vae, iter(pictures), 64, reconstruct=True, folder=tmp_path)
    assert len(calls) == 7  # a broken file is written again
    gallery.embed(pipe.vae, iter(pictures), 64, folder=tmp_path)
    assert len(calls) == 9  # without reconstructions there is nothing to find
    forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("other", ["weights", "scale factor", "precision"])
def test_nothing_of_another_vae_is_found(pipe, tmp_path, other):
    picture = [(0, np.zeros((64, 64, 3), dtype=np.uint8))]
    before = gallery.embed(pipe.vae, iter(picture), 64, folder=tmp_path).latents
    vae = copy.deepcopy(pipe.vae)
    if other == "weights":
        vae.quant_conv.bias.data += 1
    elif other == "scale factor":
        vae.config = dataclasses.replace(vae.config, scale_factor=2 * vae.config.scale_factor)
    else:
        vae = vae.bfloat16()
    found = gallery.embed(vae, iter(picture), 64, folder=tmp_path).latents
    assert found.equal(gallery.embed(vae, iter(picture), 64).latents)
    assert not found.equal(before)


def test_where_nothing_can_be_kept_the_evaluation_goes_on(pipe, tmp_path):
    """A file is in the way, as a full disk would be."""
    (tmp_path / "encoded").write_text("")
    picture = [(0, np.zeros((64, 64, 3), dtype=np.uint8))]
    with pytest.warns(UserWarning, match="encoded: not all is kept"):
        found = gallery.embed(pipe.vae, iter(picture), 64, folder=tmp_path / "encoded")
    assert found.latents.equal(gallery.embed(pipe.vae, iter(picture), 64).latents)


def changed(pipe, what):
    """Return a model that draws something else with the same weights, or with one other weight."""
    parts = {"vae": pipe.vae, "unet": pipe.unet, "text_encoder": pipe.text_encoder, "schedule": pipe.process.schedule}
    if what == "weights":
        parts["unet"] = copy.deepcopy(pipe.unet)
        parts["unet"].conv_in.bias.data += 1e-3
    elif what == "scale factor":
        parts["vae"] = copy.deepcopy(pipe.vae)
        parts["vae"].config = dataclasses.replace(pipe.vae.config, scale_factor=2.0)
    elif what == "length":
        parts["text_encoder"] = copy.deepcopy(pipe.text_encoder)
        parts["text_encoder"].max_length -= 1
    return LatentPipeline(**parts)


def test_what_draws_something_else_is_another_model(pipe):
    kinds = ["nothing", "weights", "scale factor", "length"]
    digests = [drawing.model_digest(changed(pipe, what)) for what in kinds]
    assert digests[0] == drawing.model_digest(pipe)
    assert len(set(digests)) == len(kinds)


def test_another_evaluation_is_not_overwritten(pipe, pictures, tmp_path, monkeypatch):
    """The same command again uses the pictures that are there; other settings are refused before anything is drawn."""
    data, style = DataConfig(source=str(pictures), image_size=64), "^a (photo|drawing) of "
    options = {"style": style, "num_concepts": 2, "output": tmp_path}
    found = report.evaluate(pipe, data, SETTINGS, **options)
    monkeypatch.setattr(gallery, "_see", pytest.fail)
    report.evaluate(pipe, data, SETTINGS, **options)  # after a kill before the end; nothing is encoded
    monkeypatch.undo()
    found.write(tmp_path)
    assert not (tmp_path / "encoded").exists()
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*.png")}
    again = report.evaluate(pipe, data, SETTINGS, **options)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").rglob("*.png")} == drawn
    assert again.concepts.rows == found.concepts.rows
    with pytest.raises(LatentDiffError, match=r"another evaluation \(guidance_scale: 5.0, now 3.0\): choose another"):
        report.evaluate(pipe, data, SETTINGS.model_copy(update={"guidance_scale": 3.0}), **options)
    with pytest.raises(LatentDiffError, match=r"another evaluation \(data: "):
        report.evaluate(pipe, data.model_copy(update={"max_pixels": 10**6}), SETTINGS, **options)


@pytest.mark.slow
def test_a_model_against_itself(pipe, pictures):
    """On the same seeds nothing differs, and every figure says so."""
    data = DataConfig(source=str(pictures), image_size=64, flip=False)
    settings = SETTINGS.model_copy(update={"num_steps": 1})
    found = report.evaluate(pipe, data, settings, style="^a (photo|drawing) of ", num_concepts=18,
                            against=("twin", pipe)).quality  # fmt: skip
    assert len(found.differences) == len(found.figures) == 3 + 1
    assert all(each.low == each.value == each.high == 0.0 for each in found.differences)
    assert any("twin" in line and "difference 0 (0 to 0)" in line for line in found.lines())
    assert [each["name"] for each in found.record()["figures"]][:3] == [
        "share of right concepts by latents", "share of right concepts by 32x32 RGB", "share of copies"
    ]  # fmt: skip
