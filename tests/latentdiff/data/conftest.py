import io

import datasets
import numpy as np
import pytest
from PIL import Image

from latentdiff.sections import DataConfig


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """Keep the tables that `datasets` builds in a temporary folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def config():
    def make(source, **settings):
        return DataConfig(**{"source": str(source), "image_size": 16, **settings})

    return make


@pytest.fixture
def picture():
    """Return the bytes of a small picture, a different one for each number."""

    def make(number=0, kind="PNG", size=(20, 16)):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        return file.getvalue()

    return make


@pytest.fixture
def write(picture):
    """Write pictures 0, 1, ... under the names given."""

    def make(root, *names):
        for number, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))

    return make
