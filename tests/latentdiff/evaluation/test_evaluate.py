"""The complete report, for models that copy their training pictures, where the right answer is known."""

import json

import numpy as np
import pytest
from PIL import Image

from latentdiff import LatentDiffError
from latentdiff.data.cache import read_pixels
from latentdiff.data.sources import open_source
from latentdiff.evaluation import evaluate as report
from latentdiff.sampling.settings import SamplingSettings
from latentdiff.sections import DataConfig


@pytest.fixture
def copier(monkeypatch):
    """Sampling that returns the training picture of each prompt, optionally mirrored."""

    def install(data, *, mirrored):
        def copies(_, prompts, seeds, settings, folder):
            train, _ = open_source(data)
            indices = {train.captions(index)[0]: index for index in range(len(train))}
            images = [read_pixels(train, indices[prompt], data)[:, :: -1 if mirrored else 1] for prompt in prompts]
            return [Image.fromarray(image) for image in images]

        monkeypatch.setattr(report, "draw", copies)

    return install


@pytest.mark.parametrize(
    ("limit", "flip"), [(9, False), *(pytest.param(20_000, flip, marks=pytest.mark.slow) for flip in (False, True))]
)
def test_a_perfect_copier_is_always_right(pipe, pictures, copier, monkeypatch, tmp_path, limit, flip):
    """Also if some pictures are not read, one is broken, and mirrored training pictures are copied."""
    monkeypatch.setattr(report, "MAX_TRAINING", limit)
    data = DataConfig(source=str(pictures), image_size=64, flip=flip)
    copier(data, mirrored=flip)
    settings = SamplingSettings(num_images=2, seed=3)
    found = report.evaluate(pipe, data, settings, style="^a (photo|drawing) of ")
    assert [entry.top1 for entry in found.concepts.agreements] == [1.0, 1.0]
    assert [entry.shuffled for entry in found.concepts.agreements] == [0.0, 0.0]
    assert found.concepts.gallery == min(limit, 40) - (limit == 20_000)  # the broken one is not among the nine
    found.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "drawn.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == list(range(3, 3 + len(rows)))
    for row in rows:
        assert row["latents"]["rank"] == 0
        assert row["prompt"].endswith(row["latents"]["nearest"])
    settings = json.loads((tmp_path / "evaluation.json").read_text())["settings"]
    assert (settings["guidance_scale"], settings["sampler"], settings["flip"]) == (5.0, "dpmpp_2m", flip)
    assert settings["source"] == pictures.name
    assert str(pictures) not in (tmp_path / "evaluation.json").read_text()


def test_pictures_none_of_which_can_be_used(pipe, pictures):
    data = DataConfig(source=str(pictures), image_size=64, min_size=65)
    with pytest.raises(LatentDiffError, match=r"none of 40 pictures.*example, train.39.png: .*64 x 64.*needs 65"):
        report.evaluate(pipe, data, SamplingSettings(), style="^a (photo|drawing) of ")


@pytest.mark.parametrize(
    ("source", "name"),
    [("/home/me/pictures", "pictures"), ("/home/me/pictures/*.parquet", "pictures"), ("*.parquet", "*.parquet"),
     ("builtin:emoji-mini", "builtin:emoji-mini")],
)  # fmt: skip
def test_the_source_is_named_without_its_folders(pipe, source, name):
    facts = report._settings(pipe, DataConfig(source=source), SamplingSettings(seed=0), "", 2, None, None)
    assert facts["source"] == name


def test_mirrored_copies_are_wrong_if_training_was_not_mirrored(pipe, pictures, copier):
    data = DataConfig(source=str(pictures), image_size=64, flip=False)
    copier(data, mirrored=True)
    found = report.evaluate(pipe, data, SamplingSettings(seed=3), style="^a (photo|drawing) of ")
    assert found.concepts.agreements[0].top1 < 1.0


def test_pictures_of_one_thing(pipe, pictures, tmp_path):
    """Prompt fidelity needs at least two concepts; everything else is still measured."""
    data = DataConfig(source=str(pictures), image_size=64)
    found = report.evaluate(pipe, data, SamplingSettings(seed=0), style=".*")
    assert found.concepts is None
    assert any("not measured" in line for line in found.lines())
    found.write(tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["concepts"] is None
    with pytest.raises(LatentDiffError, match="num_concepts=1: expected at least 2"):
        report.evaluate(pipe, data, SamplingSettings(seed=0), num_concepts=1)


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """12 things as photo and as drawing; four drawings are held out, and so is a thing that is never shown at all."""
    folder, random = tmp_path_factory.mktemp("styles"), np.random.default_rng(1)
    for thing in range(12):
        shape = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        for style, tint in (("photo", (0, 0, 0)), ("drawing", (90, 0, 90))):
            split = "validation" if (style == "drawing" and thing < 4) or thing == 11 else "train"
            (folder / split).mkdir(exist_ok=True)
            picture = np.clip(shape.astype(int) // 2 + tint, 0, 255).astype(np.uint8)
            path = folder / split / f"{thing:02}-{style}.png"
            Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC).save(path)
            path.with_suffix(".txt").write_text(f"a {style} of thing {thing}")
    return folder


@pytest.mark.parametrize(("draws", "right"), [("what is asked", (1.0, 1.0)), ("the photo of it", (1.0, 0.0)),
                                              ("a drawing of something else", (0.0, 1.0))])  # fmt: skip
def test_new_combinations(pipe, styles, monkeypatch, tmp_path, draws, right):
    """Of five held-out captions with a drawing, four ask for a known thing; the nearest picture shows what is drawn."""
    data = DataConfig(source=str(styles), image_size=64, flip=False)

    def drawn(_, prompts, seeds, settings, folder):
        sources = {caption[0]: (source, index) for source in open_source(data)
                   for index, caption in enumerate(source.all_captions())}  # fmt: skip
        changed = {"what is asked": lambda caption: caption,
                   "the photo of it": lambda caption: caption.replace("drawing", "photo"),
                   "a drawing of something else": lambda _: "a drawing of thing 7"}[draws]  # fmt: skip
        return [Image.fromarray(read_pixels(*sources[changed(prompt)], data)) for prompt in prompts]

    monkeypatch.setattr(report, "draw", drawn)
    settings = SamplingSettings(num_images=2, seed=3, num_steps=1)
    found = report.evaluate(pipe, data, settings, style="^a (photo|drawing) of ", num_concepts=8)
    assert (found.combinations.combinations, found.combinations.pictures) == (4, 8)
    assert found.combinations.gallery == 18 + 6
    for concept, attribute in zip(found.combinations.concepts, found.combinations.attributes, strict=True):
        assert (concept.top1, attribute.top1) == right
        assert concept.shuffled == 0.0
    assert any("8 samples of 4 new combinations" in line for line in found.lines())
    found.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "drawn-combinations.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {f"a drawing of thing {thing}" for thing in range(4)}
    assert (tmp_path / "combinations.png").is_file()
    assert json.loads((tmp_path / "evaluation.json").read_text())["combinations"]["combinations"] == 4


def test_without_new_combinations_nothing_is_said(pipe, pictures):
    data = DataConfig(source=str(pictures), image_size=64, flip=False)
    settings = SamplingSettings(num_images=1, seed=3, num_steps=1)
    found = report.evaluate(pipe, data, settings, style="^a (photo|drawing) of ", num_concepts=2)
    assert found.combinations is None
    assert not any("combination" in line for line in found.lines())
