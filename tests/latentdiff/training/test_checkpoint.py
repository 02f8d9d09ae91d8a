"""Saving and loading, detecting damage, and what a checkpoint folder always keeps."""

import json
import os
import random
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentdiff.errors import LatentDiffError
from latentdiff.training import checkpoint as module
from latentdiff.training import manifest as manifest_module
from latentdiff.training.checkpoint import newest_checkpoint, save_checkpoint, verify
from latentdiff.training.manifest import Entry, encode_manifest
from latentdiff.training.tensor_file import DTYPES


def save(folder: Path, step: int, keep: int = 2) -> module.Checkpoint:
    """A small checkpoint in which every number is the step."""
    value = torch.full((3, 5), float(step))
    tensors = {"unet": {"weight": value, "bias": value[0]}, "optimizer": {"step": torch.tensor(float(step))}}
    return save_checkpoint(folder, step, tensors, {"step": step, "loss": 0.5}, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_report(line: str) -> None:
    raise AssertionError(line)


# Contents


def test_what_was_saved_is_read(tmp_path):
    saved = save(tmp_path / "a" / "b", 1000)
    assert saved.path == tmp_path / "a" / "b" / "step-00001000"
    assert names(saved.path) == ["facts.json", "manifest.json", "optimizer.safetensors", "unet.safetensors"]
    found = newest_checkpoint(tmp_path / "a" / "b", no_report)
    assert found == saved
    assert found.metadata == {"step": 1000, "loss": 0.5}
    assert found.names() == ["optimizer", "unet"]
    assert torch.equal(found.tensors("unet")["weight"], torch.full((3, 5), 1000.0))
    assert found.tensors("optimizer")["step"].shape == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(tmp_path, dtype):
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * size,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(2, 3)
    # The single byte must not come first: readers map the file and need wider elements aligned.
    saved = save_checkpoint(tmp_path, 1, {"x": {"a": torch.zeros(1, dtype=torch.uint8), "t": tensor}}, {})
    for read in (saved.tensors("x")["t"], load_file(saved.path / "x.safetensors")["t"]):
        assert read.dtype == dtype
        assert torch.equal(read.contiguous().view(torch.uint8), tensor.view(torch.uint8))
    content = (saved.path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert json.loads(content[8 : 8 + length])["t"]["data_offsets"][0] % size == 0


LAYOUTS = {
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.randn(4, 6).T,
    "every second": torch.randn(10)[::2],
    "expanded": torch.randn(3, 1).expand(3, 4),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.randn(3)),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout_keeps_its_values(tmp_path, layout):
    tensor = LAYOUTS[layout]
    read = save_checkpoint(tmp_path, 1, {"x": {"t": tensor}}, {}).tensors("x")["t"]
    assert torch.equal(read, tensor)
    assert not read.requires_grad


def test_tensors_that_share_memory_are_saved_twice(tmp_path):
    flat = torch.arange(10.0)
    read = save_checkpoint(tmp_path, 1, {"x": {"all": flat, "part": flat[2:5]}}, {}).tensors("x")
    assert torch.equal(read["part"], flat[2:5])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_of_a_gpu(tmp_path):
    tensor = torch.randn(2, 3, 4, 5, device="cuda").to(memory_format=torch.channels_last)
    assert torch.equal(save_checkpoint(tmp_path, 1, {"x": {"t": tensor}}, {}).tensors("x")["t"], tensor.cpu())


def test_read_tensors_do_not_change_with_the_file(tmp_path):
    saved = save(tmp_path, 7)
    read = saved.tensors("unet")["weight"]
    file = saved.path / "unet.safetensors"
    with file.open("r+b") as handle:
        handle.write(b"\xff" * file.stat().st_size)
    assert torch.equal(read, torch.full((3, 5), 7.0))


def test_no_tensors_at_all(tmp_path):
    saved = save_checkpoint(tmp_path, 1, {"x": {}}, {})
    assert saved.tensors("x") == {}
    assert save_checkpoint(tmp_path, 2, {}, {}).names() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "keep=0"),
        ({"step": -1}, "step=-1"),
        ({"tensors": {"../x": {}}}, "letters, digits"),
        ({"tensors": {"a.b": {}}}, "letters, digits"),
        ({"tensors": {"x": {"__metadata__": torch.ones(1)}}}, "__metadata__"),
        ({"tensors": {"x": {"t": torch.ones(1, dtype=torch.complex128)}}}, "complex128"),
        ({"tensors": {"x": {"t": torch.eye(2).to_sparse()}}}, "sparse"),
        ({"metadata": {"x": object()}}, "not JSON-serializable"),
        ({"metadata": {"x": float("nan")}}, "not JSON-serializable"),
        ({"metadata": {"x": "y" * 2**24}}, "at most"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(LatentDiffError, match=message):
        save_checkpoint(**{"folder": tmp_path / "new", "step": 1, "tensors": {}, "metadata": {}, **arguments})
    assert not (tmp_path / "new").exists()


def test_asking_for_what_is_not_there(tmp_path):
    saved = save(tmp_path, 1)
    for name in ("ema", "../step-00000001/unet", "facts"):
        with pytest.raises(LatentDiffError, match="available: optimizer, unet"):
            saved.tensors(name)
    shutil.rmtree(saved.path)
    with pytest.raises(LatentDiffError, match=r"manifest\.json is missing"):
        saved.tensors("unet")


# Damage


def damaged(path: Path, says: str) -> None:
    problem = verify(path)
    assert problem is not None
    assert says in problem
    assert "\n" not in problem


@pytest.mark.parametrize("name", ["unet.safetensors", "optimizer.safetensors", "facts.json", "manifest.json"])
def test_a_truncated_or_missing_file_is_noticed(tmp_path, name):
    file = save(tmp_path, 1).path / name
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 0):
        file.write_bytes(whole[:size])
        damaged(file.parent, f"{name} is")
    file.write_bytes(whole + b" ")
    damaged(file.parent, f"{name} is")
    file.write_bytes(whole)
    assert verify(file.parent) is None
    file.unlink()
    damaged(file.parent, f"{name} is missing")


@pytest.mark.parametrize("size", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_noticed(tmp_path, size):
    """So many bits of each file; the checkpoint before is loaded instead, and nothing of the flipped one."""
    save(tmp_path, 1)
    path = save(tmp_path, 2).path
    generator = random.Random(0)
    for name in names(path):
        whole = (path / name).read_bytes()
        for position in generator.sample(range(len(whole) * 8), size):
            changed = bytearray(whole)
            changed[position // 8] ^= 1 << position % 8
            (path / name).write_bytes(changed)
            lines: list[str] = []
            assert newest_checkpoint(tmp_path, lines.append).step == 1, f"{name}, bit {position}"
            assert name in lines[0] or name == "manifest.json"  # a hash in it is another file's
        (path / name).write_bytes(whole)
    assert newest_checkpoint(tmp_path, no_report).step == 2


def manifest(files: dict[str, object], step: object = 1) -> bytes:
    content = {"format": 1, "step": step, "files": files}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


ENTRY = {"bytes": 2, "sha256": "0" * 64}
HOSTILE = {
    "empty": b"",
    "not text": b"\xff\xfe",
    "a list": b"[]",
    "an empty object": b"{}",
    "deep": b"[" * 200_000,
    "a long number": b'{"format": ' + b"9" * 10_000 + b"}",
    "files a list": manifest([ENTRY]),
    "files text": manifest("facts.json"),
    "entry text": manifest({"facts.json": "x"}),
    "size text": manifest({"facts.json": {"bytes": "2", "sha256": "0"}}),
    "size infinite": manifest({"facts.json": {"bytes": float("inf"), "sha256": "0"}}),
    "step text": manifest({"facts.json": ENTRY}, "1"),
    "step none": manifest({"facts.json": ENTRY}, None),
    "other step": encode_manifest(2, {"facts.json": Entry(2, "0" * 64)}),
    "no facts": encode_manifest(1, {}),
    "escape": encode_manifest(1, {"facts.json": Entry(2, "0" * 64), "../x.safetensors": Entry(1, "0" * 64)}),
    "absolute": encode_manifest(1, {"facts.json": Entry(2, "0" * 64), "/etc/passwd": Entry(1, "0" * 64)}),
    "itself": encode_manifest(1, {"facts.json": Entry(2, "0" * 64), "manifest.json": Entry(1, "0" * 64)}),
    "negative": encode_manifest(1, {"facts.json": Entry(-1, "0" * 64)}),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_just_not_good(tmp_path, text):
    path = save(tmp_path, 1).path
    (path / "manifest.json").write_bytes(text)
    assert verify(path) is not None
    assert newest_checkpoint(tmp_path, lambda line: None) is None


def test_a_manifest_cannot_name_what_lies_elsewhere(tmp_path):
    path = save(tmp_path, 1).path
    (tmp_path / "x.safetensors").write_bytes(b"x")
    digests = {
        name: module.hashlib.sha256((path / name).read_bytes()).hexdigest()
        for name in ("facts.json", "../x.safetensors")
    }
    files = {name: Entry((path / name).stat().st_size, digest) for name, digest in digests.items()}
    (path / "manifest.json").write_bytes(encode_manifest(1, files))
    damaged(path, "not a manifest written by latentdiff")


def test_a_huge_manifest_is_not_read(tmp_path):
    path = save(tmp_path, 1).path
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(2**40)  # sparse
    damaged(path, "manifest.json is larger than")


@pytest.mark.parametrize("name", ["unet.safetensors", "facts.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_plain_files_count(tmp_path, name, kind):
    file = save(tmp_path, 1).path / name
    file.rename(tmp_path / "elsewhere")
    if kind == "link":
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    damaged(file.parent, f"{name} is not a regular file")


def test_facts_that_are_no_object(tmp_path):
    path = save(tmp_path, 1).path
    (path / "facts.json").write_text("[]")
    digest = module.hashlib.sha256(b"[]").hexdigest()
    (path / "manifest.json").write_bytes(encode_manifest(1, {"facts.json": Entry(2, digest)}))
    damaged(path, "facts.json is not a JSON object")


def test_a_folder_renamed_to_another_step(tmp_path):
    path = save(tmp_path, 1).path.rename(tmp_path / "step-00000002")
    damaged(path, "manifest.json belongs to step 1")


def test_verifying_reads_everything_unless_told_otherwise(tmp_path, monkeypatch):
    path = save(tmp_path, 1).path
    read, digest = [], manifest_module.hashlib.file_digest
    monkeypatch.setattr(manifest_module.hashlib, "file_digest", lambda *args: read.append(args) or digest(*args))
    assert verify(path, rehash=False) is None
    assert not read
    assert verify(path) is None
    assert len(read) == 3


# The newest


def test_damaged_ones_are_passed_over_and_reported(tmp_path):
    for step in (500, 1000, 1500):
        save(tmp_path, step, keep=3)
    with (tmp_path / "step-00001000" / "unet.safetensors").open("r+b") as file:
        file.truncate(10)
    (tmp_path / "step-00001500" / "facts.json").unlink()
    lines: list[str] = []
    assert newest_checkpoint(tmp_path, lines.append).step == 500
    assert lines[0] == "step-00001500: facts.json is missing; using step-00000500"
    assert lines[1].startswith("step-00001000: unet.safetensors is truncated (10 of ")
    assert lines[1].endswith(" bytes); using step-00000500")
    shutil.rmtree(tmp_path / "step-00000500")
    assert newest_checkpoint(tmp_path, lines.append) is None
    assert lines[-1].endswith("; there is no intact checkpoint")


def test_none_where_there_is_nothing(tmp_path):
    assert newest_checkpoint(tmp_path, no_report) is None
    assert newest_checkpoint(tmp_path / "missing", no_report) is None


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LatentDiffError, match="cannot be searched"):
        newest_checkpoint(tmp_path / "file", no_report)


def test_steps_are_numbers(tmp_path):
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    assert newest_checkpoint(tmp_path, no_report).step == 100_000_000


def test_strays_are_neither_used_nor_removed(tmp_path):
    elsewhere = save(tmp_path / "elsewhere", 2).path
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "step-00000001").touch()  # a file
    (folder / "notes.txt").touch()
    (folder / "step-00000002").symlink_to(elsewhere)
    (folder / ".trash-step-00000002-x").symlink_to(elsewhere)
    for name in ("step-999999", ".partial-step-99999999-x", "step-00000003", "x-step-00000009"):
        (folder / name).mkdir()
        (folder / name / "mine.txt").touch()
    assert newest_checkpoint(folder, lambda line: None) is None
    strays = set(names(folder))
    for step in (10, 20, 30):
        save(folder, step, keep=1)
    assert set(names(folder)) == strays | {"step-00000030"}
    assert verify(elsewhere) is None
    assert all((folder / name / "mine.txt").exists() for name in ("step-999999", "step-00000003"))


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_in_the_way_is_left_and_named(tmp_path, kind):
    save(tmp_path, 1)
    target = tmp_path / "step-00000002"
    if kind == "link":
        target.symlink_to(tmp_path / "step-00000001")
    elif kind == "file":
        target.touch()
    else:
        target.mkdir()
        (target / "mine.txt").touch()
    with pytest.raises(LatentDiffError, match="step 2 cannot be written"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert newest_checkpoint(tmp_path, lambda line: None).step == 1


# Rotation


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(tmp_path, keep):
    for step in range(1, 6):
        save(tmp_path, step, keep)
        assert names(tmp_path) == [f"step-{kept:08d}" for kept in range(max(1, step - keep + 1), step + 1)]


@pytest.mark.parametrize("new_process", [False, True])
def test_damaged_ones_do_not_count_and_go(tmp_path, monkeypatch, new_process):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    file = tmp_path / "step-00000003" / "unet.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    file.write_bytes(changed)
    if new_process:
        monkeypatch.setattr("latentdiff.training.manifest._verified", set())
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_later_steps_are_left_alone(tmp_path):
    for step in (10, 20, 5):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-00000005", "step-00000020"]
    save(tmp_path, 30, keep=1)
    assert names(tmp_path) == ["step-00000030"]


@pytest.mark.parametrize("state", ["good", "bad", "good and old", "bad and old", "old only"])
def test_the_same_step_again(tmp_path, state):
    path = save(tmp_path, 1).path
    if "old" in state:
        shutil.copytree(path, tmp_path / "step-00000001.old")
    if "bad" in state:
        (path / "facts.json").unlink()
    if state == "old only":
        shutil.rmtree(path)
        assert newest_checkpoint(tmp_path, no_report).path.name == "step-00000001.old"
    saved = save_checkpoint(tmp_path, 1, {}, {"second": True}, keep=3)
    assert names(tmp_path) == ["step-00000001"]
    assert newest_checkpoint(tmp_path, no_report) == saved
    assert saved.metadata == {"second": True}


def test_leftovers_of_a_crash_are_swept(tmp_path):
    path = save(tmp_path, 1).path
    for purpose in ("partial", "trash"):
        shutil.copytree(path, module._temporary_path(path, purpose))
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


# The disk

Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, 2_500_000))
    with pytest.raises(
        LatentDiffError, match=r"too full for a checkpoint: 5\.0 MB needed, 2\.5 MB available"
    ) as caught:
        save_checkpoint(tmp_path, 2, {"x": {"t": torch.zeros(1_000_000)}}, {})
    assert str(tmp_path) in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    save(tmp_path, 2)


def test_large_amounts_read_in_gigabytes():
    assert module._format_bytes(13_820_000_000) == "13.8 GB"


def test_what_reads_back_wrong_never_gets_the_name(tmp_path, monkeypatch):
    """The disk stores something else than what was written; the hash is of the data that was passed in."""
    save(tmp_path, 1, keep=1)
    write = module._write

    def bad_disk(path, chunks):
        entry = write(path, chunks)
        if path.name == "unet.safetensors":
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        return entry

    monkeypatch.setattr(module, "_write", bad_disk)
    with pytest.raises(LatentDiffError, match=r"step 2 failed verification: unet\.safetensors is corrupt"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert newest_checkpoint(tmp_path, no_report).step == 1
