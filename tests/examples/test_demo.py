"""`make demo`: the sheet it makes; and, slowly, all of it."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

DEMO = Path(__file__).resolve().parents[2] / "examples/demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_beside(demo, tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (50, 40), colour).save(tmp_path / f"{name}.png")
    sheet = demo.beside({"before": tmp_path / "a.png", "after": tmp_path / "b.png"})
    assert sheet.size == (100, 40 + demo.HEADING)
    assert sheet.getpixel((25, demo.HEADING + 20)) == (255, 0, 0)
    assert sheet.getpixel((75, demo.HEADING + 20)) == (0, 0, 255)
    assert any(sheet.getpixel((x, y)) != (255, 255, 255) for x in range(50) for y in range(demo.HEADING))


@pytest.mark.slow
def test_a_command_that_fails_ends_the_demo(demo, capfd):
    with pytest.raises(SystemExit) as stopped:
        demo.run("latentdiff", "sample", "a", "--model", "nothing")
    assert stopped.value.code == 1
    captured = capfd.readouterr()
    assert "$ latentdiff sample a --model nothing" in captured.out
    assert "no such folder or file" in captured.err


@pytest.mark.slow
def test_the_users_own_accelerate_config_does_not_count(demo, monkeypatch, tmp_path, capfd):
    """Someone who set accelerate up for DeepSpeed on eight GPUs has the demo all the same."""
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_processes: 8\nnum_machines: 1\n"
        "deepspeed_config: {zero_stage: 2}\nmixed_precision: bf16\nuse_cpu: false\n"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    demo.run(*demo.LAUNCH, "--help")
    assert "--config" in capfd.readouterr().out
    with pytest.raises(SystemExit):  # it would have counted
        demo.run("accelerate", "launch", "--quiet", "train_latent.py", "--help")


@pytest.mark.slow
def test_the_whole_demo_twice(tmp_path):
    """It learns, it leaves what it says, and the second time nothing is done again."""
    command = [sys.executable, DEMO, "--output", tmp_path / "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for path in ("drawn/grid.png", "training/before-and-after.png", "training/model/model_index.json"):
        assert (tmp_path / "demo" / path).is_file(), done.stdout
    lines = map(json.loads, (tmp_path / "demo/training/train_latent/log.jsonl").read_text().splitlines())
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert losses[max(losses)] < 0.7 * losses[0]
    assert f"{losses[0]:.3f} before, {losses[max(losses)]:.3f} after" in done.stdout
    start = time.perf_counter()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 120
    assert f"{losses[max(losses)]:.3f} after" in again.stdout
