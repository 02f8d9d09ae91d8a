"""The report: what it says of whole, stopped, failed and broken runs, and that it is one file that asks for nothing."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from latentdiff.cli import app
from latentdiff.errors import LatentDiffError
from latentdiff.evaluation.figures import estimate, halve
from latentdiff.report import pictures
from latentdiff.report.curves import BANDWIDTH, smooth
from latentdiff.report.page import write_report
from latentdiff.report.run import read_run
from latentdiff.report.times import SAVING, VALIDATION, times
from latentdiff.training.record import begin_record, end_record
from latentdiff.training.signals import StopReason
from latentdiff.training.stopped import Stopped

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'text' $x$"


class Page(HTMLParser):
    """Elements, and the addresses they would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.checked, self.ids = [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.checked += "checked" in values
        self.ids += [values["id"]] if "id" in values else []
        self.fetched += [value for name, value in attrs if name in ("src", "srcset", "data", "poster", "action")]
        self.fetched += [values["href"]] if tag in ("link", "image", "use") and "href" in values else []


@pytest.fixture
def run(tmp_path):
    """A run of one stage as training writes it, with a caption and a path that are markup."""
    folder = tmp_path / "a <b> run"
    (folder / "train_latent/samples").mkdir(parents=True)
    config = {"output": str(folder), "data": {"source": "/home/someone/pictures"},
              "train_latent": {"batch_size": 4}, "validation": {"prompts": [HOSTILE]}}  # fmt: skip
    begin_record(folder, {"config": config, "device": "x86_64", "precision": "fp32"})
    lines = [{"step": 0, "began": "now", "seconds": 5.0}]
    for step in range(10, 110, 10):
        lines.append({"step": step, "loss": 1 / step, "pictures_per_second": 20.0, "time_data": 0.25,
                      "time_model": 0.75, "seconds": 5 + 0.2 * step + 3 * (step > 50)})  # fmt: skip
        if step == 50:
            lines.append({"step": 50, "validation_loss": 0.03, "validation_loss_band_0": 0.04, "seconds": 18.0})
    (folder / "train_latent/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (50, 100):
        Image.effect_noise((64, 48), 60).convert("RGB").save(folder / f"train_latent/samples/step-{step:08}.png")
    (folder / "data.json").write_text(json.dumps({"training": {"pictures": 17, "without_caption": 2}}))
    end_record(folder, None, 30.0, print, report=False)
    return folder


def test_one_file_that_asks_for_nothing_and_is_always_the_same(run, tmp_path):
    text, again = (write_report([run], tmp_path / name).read_text() for name in ("1.html", "2.html"))
    assert re.sub(r"<time>.*?</time>", "", text) == re.sub(r"<time>.*?</time>", "", again)
    page = Page(text)
    assert page.fetched
    assert all(address.startswith("data:") for address in page.fetched)
    assert not {"script", "iframe", "object", "embed", "form"} & set(page.tags)
    assert not re.findall(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    assert page.checked == 1  # of the two samples
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; " in text
    assert "a &lt;b&gt; run" in text
    assert "/home/someone" not in text
    assert "17" in text
    assert "Not everything could be read" not in text


@pytest.mark.slow
def test_a_page_is_below_five_megabytes_and_says_what_it_leaves_out(run, monkeypatch):
    """Noise compresses worst: 16 previews would have 3 MB, more than their share."""
    monkeypatch.setattr("latentdiff.report.panels.draw", lambda *_: "")
    for step in range(16):
        Image.effect_noise((600, 600), 90).convert("RGB").save(run / f"train_latent/samples/step-{step:08}.png")
    text = write_report([run]).read_text()
    assert len(text.encode()) < 5_000_000
    shown = [int(step) for step in re.findall(r'alt="Samples at step (\d+)"', text)]
    assert (shown[0], shown[-1]) == (0, 100)
    assert f"{len(shown)} of 18 are shown, evenly spaced" in text


BROKEN = {
    "train_latent/log.jsonl": (b'{"step": 5, "loss": 2}\n{"step": 6, "lo', b"\x00\xff\x80rubbish\n" * 9, b"", b"[1]\n",
                               b'{"step": -1}\n{"step": "x"}\n{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1e999}\n',
                               b'{"step": 1, "loss": ' + b"9" * 400 + b"}\n", b"[" * 99999),
    "run.json": (None, b"{", b"[]", b'{"launches": [1, {"config": [], "end": 3, "command": 5, "versions": "x"}]}'),
    "data.json": (b"\xff", b'{"training": 5, "left_out": "text"}'),
    "train_latent/samples/step-00000050.png": (None, b"\x89PNG\r\n\x1a\n", b""),
    "evaluation.json": (b'{"concepts": {"agreements": [5, {"top1": "much"}]}, "vae": [], "denoising": 7}', b"nul",
                        b'{"quality": {"figures": [3, {"value": "x"}], "drawn": 4}, "vae": {"figures": {}}}'),
    "likelihood.json": (b'{"bound": "all", "captions": [-1, null]}', b'[{"nats": 1}, 7, {"nats": "x"}]'),
    "drawn.jsonl": (b'{"prompt": 5, "latents": []}\n{', b"\x80"),
    "README.md": (b"# card <script>\n\n![picture](https://example.com/x.png)\n\n[x](javascript:alert)\xff",),
    "model/model_index.json": (b"{}",),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), [(name, each) for name, several in BROKEN.items() for each in several])
def test_what_is_broken_is_named_and_the_rest_is_shown(run, name, content, monkeypatch):
    path = run / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr("latentdiff.report.panels.draw", lambda *_: "")  # drawn elsewhere, and slowly
    text = write_report([run]).read_text()
    assert "<script" not in text
    assert 'src="http' not in text
    assert 'href="javascript' not in text
    if name == "run.json" or content in (b"{", b"[" * 99999, b"\xff", b"nul"):
        assert "Not everything could be read" in text
    if name.endswith("50.png") and content is not None:
        assert "step-00000050.png cannot be shown" in text


def test_a_log_that_was_cut_keeps_its_whole_lines(run):
    path = run / "train_latent/log.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    found = read_run(run, "run")
    assert found.stages["train_latent"].series("loss")[0][-1] == 90
    assert found.problems == ["train_latent/log.jsonl: 1 line is broken and left out."]


def test_an_empty_folder_and_no_folder(tmp_path):
    assert "no log of a training" in write_report([tmp_path]).read_text()
    with pytest.raises(LatentDiffError, match="no such folder"):
        write_report([tmp_path / "none"])
    with pytest.raises(LatentDiffError, match="at most 8"):
        write_report([tmp_path] * 9)
    with pytest.raises(LatentDiffError, match="cannot be written"):
        write_report([tmp_path], tmp_path / "none/report.html")


def test_where_the_time_went(run):
    """100 steps of 4 pictures at 20 a second are 20 s; a validation of 3 s; 5 s before and 2 after; nothing is lost."""
    spent = {each.part: each.seconds for each in times(read_run(run, ""))}
    assert spent[VALIDATION] == pytest.approx(3)
    assert spent["steps: reading pictures"] == pytest.approx(5)
    assert spent["steps: forward and backward passes"] == pytest.approx(15)
    assert spent.get(SAVING, 0) == pytest.approx(0, abs=1e-9)
    assert spent["start: imports, pictures, caches"] == pytest.approx(5)
    assert sum(spent.values()) == pytest.approx(30)


def test_the_band_holds_two_thirds_of_gaussian_noise():
    """A power law with log-normal noise of deviation 0.2: the line follows it, the band is as wide as the noise."""
    steps = np.arange(1000.0, 5000.0)
    noise = np.random.default_rng(0).normal(0, 0.2, len(steps))
    at, mean, low, high = smooth(steps, steps**-0.5 * np.exp(noise))
    inner = slice(30, -30)  # at the ends, only one side counts
    assert np.abs(np.log(mean * at**0.5))[inner].max() < 0.03
    assert np.log(high / mean)[inner].mean() == pytest.approx(np.hypot(0.2, 0.5 * BANDWIDTH), rel=0.05)
    assert np.allclose(high / mean, mean / low)


def test_runs_are_compared_with_their_ends_and_marks(run, tmp_path):
    other = tmp_path / "other"
    (other / "train_latent").mkdir(parents=True)
    (other / "train_latent/log.jsonl").write_text('{"step": 3, "loss": 2.0}\n{"step": 3, "stopped": "SIGTERM"}\n')
    begin_record(other, {"config": {}})
    end_record(other, Stopped("stopped at step 3: SIGTERM", StopReason.SIGTERM), 2.0, print, report=False)
    text = write_report([run, other]).read_text()
    assert "stopped: stopped at step 3: SIGTERM" in text
    assert "finished" in text
    assert "report of 2 trainings" in text
    assert "stroke: var(--c1)" in text


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, "finished"), (Stopped("x", StopReason.SIGINT), "stopped"), (Stopped("x", StopReason.NOT_FINITE), "failed"),
     (MemoryError("x"), "failed"), (KeyboardInterrupt(), "stopped")],
)  # fmt: skip
def test_how_a_launch_ended(tmp_path, error, outcome):
    begin_record(tmp_path, {"config": {}})
    end_record(tmp_path, error, 1.0, print, report=False)
    assert json.loads((tmp_path / "run.json").read_text())["launches"][0]["end"]["outcome"] == outcome


def test_a_report_that_fails_is_one_line_of_warning(run, monkeypatch):
    def fail(*_):
        raise MemoryError("too much")

    monkeypatch.setattr("latentdiff.report.page.render", fail)
    said = []
    end_record(run, None, 1.0, said.append, report=True)
    assert said == ["warning: the report could not be written (MemoryError: too much)"]


def test_what_failed_before_it_ever_trained_has_no_report(run, tmp_path):
    said, error = [], LatentDiffError("data.source='nowhere': no such file or folder")
    (tmp_path / "new").mkdir()
    begin_record(tmp_path / "new", {"config": {}})
    end_record(tmp_path / "new", error, 1.0, said.append, report=True)
    assert said == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]
    end_record(run, error, 1.0, said.append, report=True)
    assert said == [f"report: {run / 'report.html'}"]


def test_the_command(run, tmp_path, monkeypatch):
    monkeypatch.setattr("latentdiff.report.panels.draw", lambda *_: "")
    output = tmp_path / "elsewhere.html"
    run.chmod(0o500)
    result = CliRunner().invoke(app, ["report", str(run), "--output", str(output), "--watch"])
    run.chmod(0o700)
    assert result.exit_code == 0, result.output
    assert 'http-equiv="refresh"' not in output.read_text()  # the run has ended
    assert not (run / "report.html").exists()
    assert 'http-equiv="refresh" content="30"' in write_report([run], output, 30.0).read_text()


def test_the_figures_of_an_evaluation_are_shown_as_it_writes_them(run):
    """The report once knew only those of an older evaluation."""
    halves = halve(range(40), range(-40, 0))
    (figure,) = estimate(["share of copies"], lambda _, columns: (columns % 4 == 0).double().mean()[None], halves,
                         (40, 40), shares=["share of copies"])  # fmt: skip
    drawn = "40 pictures of 40 prompts at guidance 3, 25 steps of dpmpp_2m"
    (run / "evaluation.json").write_text(json.dumps({"quality": {"figures": [figure.record()], "drawn": drawn}}))
    text = write_report([run]).read_text()
    assert drawn in text
    assert f"<td>{figure}</td><td>40 against 40</td>" in re.sub(r"\s*(</?td>)\s*", r"\1", text)


def test_pictures_are_thinned_out_before_they_are_shrunk(tmp_path):
    files = []
    for step in range(9):
        files.append((step, tmp_path / f"{step}.png"))
        Image.effect_noise((300, 200), 80).convert("RGB").save(files[-1][1])
    every, few, small = (pictures.embed(files, limit) for limit in (9_000_000, 250_000, 20_000))
    assert [picture.step for picture in every.pictures] == list(range(9))
    assert [few.pictures[0].step, few.pictures[-1].step, few.pictures[0].width] == [0, 8, 300]
    assert 2 < len(few.pictures) < 9
    assert len(small.pictures) == 2
    assert small.pictures[0].width < 300
    assert sum(len(picture.uri) for picture in small.pictures) <= 20_000
