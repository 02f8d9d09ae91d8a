"""Models on the Hub, downloaded by the real client from a local server."""

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
SHIPPED = ASSETS / "emoji-256"
OPEN = """
import sys, torch
from latentdiff import LatentPipeline
pipe = LatentPipeline.from_pretrained("someone/model", variant=sys.argv[1] or None)
pipe("a 3d emoji of a red apple", num_steps=1, seed=0)[0].save(f"{sys.argv[2]}/model.png")
"""
ENCODE = """
import sys
from safetensors.torch import save_file
from text_encoder import TextEncoder
encoder = TextEncoder.from_pretrained("someone/text", variant=sys.argv[1] or None)
save_file({"context": encoder(["a red apple"])}, f"{sys.argv[2]}/text.safetensors")
"""


@pytest.fixture
def hub(tmp_path):
    """A folder whose folders a local Hub serves as someone/NAME, its address, and the list of requested NAME/FILE.

    `model` is the shipped model, `text` its text encoder and tokenizer in one folder, like `bert-base-uncased`.
    """
    folder, requested = tmp_path / "offered", []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/api/models").removeprefix("/someone/")
            name, _, rest = path.partition("/")
            files = {file.relative_to(folder / name).as_posix(): file
                     for file in sorted((folder / name).rglob("*")) if file.is_file()}  # fmt: skip
            if rest == "revision/main":
                siblings = [{"rfilename": file} for file in files]
                return self.answer({"id": f"someone/{name}", "sha": REVISION, "siblings": siblings})
            if rest == f"tree/{REVISION}":
                oids = {file: sha256(file.encode()).hexdigest()[:40] for file in files}
                return self.answer([{"type": "file", "path": file, "size": path.stat().st_size, "oid": oids[file]}
                                    for file, path in files.items()])  # fmt: skip
            file = rest.removeprefix(f"resolve/{REVISION}/")
            if file not in files:
                return self.send_error(404)
            requested.append(f"{name}/{file}")
            return self.answer(files[file].read_bytes())

        do_HEAD = do_GET

        def answer(self, body):
            kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
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

    shutil.copytree(SHIPPED, folder / "model")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(SHIPPED / part, folder / "text", dirs_exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    server.server_close()


@pytest.fixture
def made(hub, tmp_path):
    """Return the contents of the files that a program makes with what is on the Hub, in a process of its own."""

    def make(program, variant="", **more):
        environment = {**os.environ, "HF_ENDPOINT": hub[1], "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"),
                       "HF_HUB_DISABLE_XET": "1", **more}  # fmt: skip
        (tmp_path / "made").mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, "-c", program, variant, tmp_path / "made"], env=environment,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}

    return make


UNNEEDED = ["model/v1-5-pruned.safetensors", "model/safety_checker/model.safetensors",
            "model/unet/diffusion_pytorch_model.bin", "model/unet/diffusion_pytorch_model.non_ema.safetensors",
            "model/vae/diffusion_pytorch_model.fp16.safetensors", "model/unet/run_me.py",
            "model/unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"]  # fmt: skip
NOT_TEXT = ["text/pytorch_model.bin", "text/tf_model.h5", "text/onnx/model.onnx", "text/model.bf16.safetensors",
            "text/modeling_bert.py"]  # fmt: skip


def offer_more(folder, files):
    """Add files that nobody needs."""
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"not to be fetched")


def as_variant(folder, name):
    """Rename all weight files to a variant."""
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(f".{name}.safetensors"))


@pytest.mark.slow
def test_only_needed_files_are_downloaded_and_then_cached(hub, made):
    """Config, tokenizer and safetensors weights are downloaded, but no pickles, no code and no other variants."""
    folder, _, requested = hub
    text = {
        f"text/{file.name}" for file in (folder / "text").iterdir() if file.suffix in (".json", ".txt", ".safetensors")
    }
    offer_more(folder, UNNEEDED + NOT_TEXT)
    first = made(OPEN + ENCODE)
    assert first.keys() == {"model.png", "text.safetensors"}
    needed = {"model/model_index.json", *(f"model/{part}/config.json" for part in ("unet", "vae", "text_encoder"))}
    assert needed <= set(requested)
    assert not {*UNNEEDED, *NOT_TEXT} & set(requested)
    assert {file for file in requested if file.startswith("text/")} == text
    offline = made(OPEN + ENCODE, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline == first  # from the cache


@pytest.mark.slow
def test_a_variant_of_a_text_encoder(hub, made):
    folder, _, requested = hub
    as_variant(folder / "text", "fp16")
    needed = {f"text/{file.name}" for file in (folder / "text").iterdir()}
    offer_more(folder, [*NOT_TEXT, "text/model.safetensors"])
    first = made(ENCODE, "fp16")
    assert set(requested) == needed
    assert made(ENCODE, "fp16", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9") == first


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp16", ""])
def test_variants(hub, made, variant):
    """The requested variant is downloaded, or the only one that a part has."""
    folder, _, requested = hub
    as_variant(folder / "model" if variant else folder / "model/text_encoder", "fp16")
    if variant:
        (folder / "model/unet/diffusion_pytorch_model.safetensors").write_bytes(b"not to be fetched")
    made(OPEN, variant)
    assert "model/text_encoder/model.fp16.safetensors" in requested
    assert "model/unet/diffusion_pytorch_model.safetensors" not in requested or not variant
