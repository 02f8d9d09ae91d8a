"""A second command for the same output: what is done is skipped, and other settings are refused and change nothing."""

import json
import shutil

from latentdiff.files.launches import last_launch
from latentdiff.report.run import read_run


def test_what_is_done_is_skipped_and_what_changed_is_refused(train, said, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted("fp32"), tmp_path / "run")
    assert train("run") == 0
    assert said("run").count("already done") == 2
    assert train("run", "train_vae.learning_rate=1e-3") == 1
    assert "vae: was made with train_vae.learning_rate=0.002, but it is now 0.001" in said("run")
    launches = json.loads((tmp_path / "run/run.json").read_text())["launches"]
    assert [launch["end"]["outcome"] for launch in launches[-2:]] == ["finished", "failed"]
    assert last_launch(launches) == launches[-2]  # what is there was not made with the refused settings
    assert read_run(tmp_path / "run", "run").end["outcome"] == "finished"


def test_a_refused_run_with_other_pictures_leaves_what_is_said_of_those_that_were_used(
    train, said, uninterrupted, sixty, tmp_path
):
    shutil.copytree(uninterrupted("fp32"), tmp_path / "run")
    before = (tmp_path / "run/data.json").read_text()
    assert train("run", f"data.source={sixty}") == 1
    assert "was made with data.source=" in said("run")
    assert (tmp_path / "run/data.json").read_text() == before
    assert json.loads(before)["training"]["pictures"] == 24


def test_another_config_does_not_continue_a_run(train, said, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted("fp32"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert train("run", "train_latent.learning_rate=1e-4") == 1
    assert "this run started with train_latent.learning_rate=0.001, but it is now 0.0001" in said("run")
