"""Models and data sets that ship with the package."""

from pathlib import Path

import numpy as np
import pytest

from latentdiff import LatentDiffError, LatentPipeline
from latentdiff.assets import ASSETS, part_folder, pictures_folder, shipped_models, shipped_pictures
from latentdiff.files.open import find_model


def test_names():
    assert "emoji-mini" in shipped_pictures()
    assert shipped_models() == ["emoji-256"]
    assert not set(shipped_models()) & set(shipped_pictures())
    assert pictures_folder("my-pictures") == part_folder("my-pictures", "vae") == "my-pictures"
    assert pictures_folder("builtin:emoji-mini").endswith("emoji-mini")
    with pytest.raises(LatentDiffError, match=r"unknown built-in model 'emoji-265': .* did you mean 'emoji-256'"):
        part_folder("builtin:emoji-265", "unet")
    assert part_folder("builtin:emoji-64", "vae").endswith("emoji-64/vae")
    with pytest.raises(LatentDiffError, match=r"unknown built-in model 'emoji-64'"):
        part_folder("builtin:emoji-64", "unet")


@pytest.mark.slow
def test_the_default_model_samples():
    """Offline and without a name: images depend on the prompt and are reproducible."""
    pipe = LatentPipeline.from_pretrained(device="cpu")
    apple, tree = pipe(["a 3d emoji of a red apple", "a noto emoji of a palm tree"], seed=0, num_steps=4)
    assert apple.size == (256, 256)
    assert apple.tobytes() != tree.tobytes()
    alone = np.asarray(pipe("a 3d emoji of a red apple", seed=0, num_steps=4)[0]).astype(int)
    assert np.abs(alone - np.asarray(apple)).max() <= 2  # of 255: batches round differently


def test_the_default_model_is_the_shipped_one(tmp_path, monkeypatch):
    """A user's folder ./emoji-256 takes precedence over the shipped model of that name, but not over the default."""
    (tmp_path / "emoji-256").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model(None) == ASSETS / "emoji-256"
    assert find_model("emoji-256") == Path("emoji-256")


def test_it_fits_in_a_wheel():
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert size <= (64 + 14) * 2**20  # the model, a VAE for demo and the pictures
