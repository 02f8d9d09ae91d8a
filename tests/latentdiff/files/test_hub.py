"""A model on the Hub, downloaded by the real client from a local server that offers a single model."""

import json
import os
import shutil
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from latentdiff.assets import ASSETS

REVISION = "0123456789abcdef0123456789abcdef01234567"
SHIPPED = ASSETS / "emoji-64"
OPEN = """
import sys, torch
from latentdiff import LatentPipeline
variant = sys.argv[1] or None
pipe = LatentPipeline.from_pretrained("someone/model", variant=variant)
pipe("a 3d emoji of a red apple", num_steps=1, seed=0)[0].save(sys.argv[2])
"""
ENCODE = """
import sys
from safetensors.torch import save_file
from text_encoder import TextEncoder
variant = sys.argv[1] or None
encoder = TextEncoder.from_pretrained("someone/model", variant=variant)
save_file({"context": encoder(["a red apple"])}, sys.argv[2])
"""


@pytest.fixture
def hub(tmp_path):
    """A folder that a local Hub serves as someone/model, its address, and the list of requested files."""
    folder, requested = tmp_path / "offered", []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
            if path == "/api/models/someone/model/revision/main":
                listing = {"id": "someone/model", "sha": REVISION, "siblings": [{"rfilename": file} for file in files]}
                return self.answer(json.dumps(listing).encode(), "application/json")
            if path == f"/api/models/someone/model/tree/{REVISION}":
                tree = [{"type": "file", "path": file, "size": (folder / file).stat().st_size,
                         "oid": sha256(file.encode()).hexdigest()[:40]} for file in files]  # fmt: skip
                return self.answer(json.dumps(tree).encode(), "application/json")
            file = path.removeprefix(f"/someone/model/resolve/{REVISION}/")
            if file not in files:
                return self.send_error(404)
            requested.append(file)
            return self.answer((folder / file).read_bytes(), "application/octet-stream")

        do_HEAD = do_GET

        def answer(self, body, kind):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", kind)
            self.send_header("ETag", f'"{sha256(body).hexdigest()[:40]}"')
            self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    shutil.copytree(SHIPPED, folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    server.server_close()


@pytest.fixture
def made(hub, tmp_path):
    """Return the file that a program makes with someone/model, in a process of its own."""

    def make(program, variant="", **more):
        environment = {**os.environ, "HF_ENDPOINT": hub[1], "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"),
                       "HF_HUB_DISABLE_XET": "1", **more}  # fmt: skip
        done = subprocess.run([sys.executable, "-c", program, variant, tmp_path / "made.png"], env=environment,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return (tmp_path / "made.png").read_bytes()

    return make


def as_variant(folder, name):
    """Rename all weight files to a variant."""
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(f".{name}.safetensors"))


def test_only_needed_files_are_downloaded_and_then_cached(hub, made):
    folder, _, requested = hub
    unneeded = ["v1-5-pruned.safetensors", "safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin",
                "unet/diffusion_pytorch_model.non_ema.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
                "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "unet/run_me.py"]  # fmt: skip
    for file in unneeded:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"not to be fetched")
    first = made(OPEN)
    needed = {"model_index.json", *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))}
    assert needed <= set(requested)
    assert not set(unneeded) & set(requested)
    assert made(OPEN, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9") == first  # offline, from the cache


@pytest.fixture
def text_hub(hub):
    """The Hub serves only a text encoder, in one folder with its tokenizer, like `bert-base-uncased`."""
    folder, _, requested = hub
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in part.iterdir() if part.name in ("text_encoder", "tokenizer") else ():
            file.rename(folder / file.name)
        shutil.rmtree(part)
    for file in ("model_index.json", "evaluation.json"):
        (folder / file).unlink()
    return folder, requested


@pytest.mark.parametrize("variant", ["", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_text_encoder(text_hub, made, variant):
    """Config, tokenizer and safetensors weights are downloaded, but no pickles and no code."""
    folder, requested = text_hub
    if variant:
        as_variant(folder, variant)
    needed = {file.name for file in folder.iterdir() if file.suffix in (".json", ".txt", ".safetensors")}
    for file in ("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "model.bf16.safetensors", "modeling_bert.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"not to be fetched")
    first = made(ENCODE, variant)
    assert set(requested) == needed
    assert made(ENCODE, variant, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9") == first


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp16", ""])
def test_variants(hub, made, variant):
    """The requested variant is downloaded, or the only one that a part has."""
    folder, _, requested = hub
    as_variant(folder if variant else folder / "text_encoder", "fp16")
    if variant:
        (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"not to be fetched")
    made(OPEN, variant)
    assert "text_encoder/model.fp16.safetensors" in requested
    assert "unet/diffusion_pytorch_model.safetensors" not in requested or not variant
