import csv
import json
import logging
import os
import pickle
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.utils.logging import is_progress_bar_enabled

from latentdiff.data import tables
from latentdiff.data.folders import split_of_file
from latentdiff.data.pictures import PictureError
from latentdiff.data.sources import hold_out, open_source, read_quarantine
from latentdiff.errors import LatentDiffError

SOME = [f"{number:02}.png" for number in range(12)]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def everything(*sources):
    """All captions, by picture name."""
    return {source.name(index): source.captions(index) for source in sources for index in range(len(source))}


def parquet(path, pictures, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": data, "path": None} for data in pictures]
    pq.write_table(pa.table({"image": cells, **columns}), path)


@pytest.fixture
def folder(tmp_path, write):
    """Twelve pictures, each with a .txt file next to it."""
    root = tmp_path / "some [odd] name*"
    write(root, *SOME)
    for name in SOME:
        (root / name).with_suffix(".txt").write_text(f"picture {name[:2]}\n\n a second \n")
    return root


def test_text_folder(folder, config, picture):
    train, validation = open_source(config(folder))
    assert everything(train, validation) == {name: [f"picture {name[:2]}", "a second"] for name in SOME}
    assert train.read(0) == picture(int(train.name(0)[:2]))
    assert list(train.all_captions()) == [train.captions(index) for index in range(len(train))]
    assert list(train.names()) == [train.name(index) for index in range(len(train))]


def test_text_folder_with_splits(tmp_path, config, write):
    write(
        tmp_path, "train/a.png", "train/inner/b.jpeg", "val/a.png", "test/t.png", "train/.hidden.png", "train/notes.md"
    )
    for name in ("train/a", "train/inner/b", "val/a", "test/t"):
        (tmp_path / name).with_suffix(".txt").write_text(name)
    train, validation = open_source(config(tmp_path))
    assert everything(train) == {"train/a.png": ["train/a"], "train/inner/b.jpeg": ["train/inner/b"]}
    assert everything(validation) == {"val/a.png": ["val/a"]}
    assert list(everything(open_source(config(tmp_path, validation_split="test"))[1])) == ["test/t.png"]


def test_a_picture_named_train_is_not_a_split(tmp_path, config, write):
    """`datasets` itself would take one of these files for the entire training set."""
    write(tmp_path, "train.png", "a test.png", "validation-1.png")
    for name in ("train", "a test", "validation-1"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert len(everything(*open_source(config(tmp_path)))) == 3


def test_changed_captions_are_read_again(folder, config):
    before = open_source(config(folder))[0].stat_fingerprint()
    assert open_source(config(folder))[0].stat_fingerprint() == before
    (folder / "00.txt").write_text("something new")
    train, validation = open_source(config(folder))
    assert everything(train, validation)["00.png"] == ["something new"]
    assert train.stat_fingerprint() != before


def test_changed_pictures_change_the_fingerprint(tmp_path, config, write, picture):
    write(tmp_path, "a.png", "b.png")
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": name, "text": name} for name in ("a.png", "b.png")])
    before = open_source(config(tmp_path))[0].stat_fingerprint()
    for name in ("a.png", "b.png"):
        os.utime(tmp_path / name, ns=(1, 1))
    assert open_source(config(tmp_path))[0].stat_fingerprint() != before


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tmp_path, config, write, kind):
    write(tmp_path, "a.png", "deep/b.png", "not mentioned.png")
    rows = [{"file_name": "a.png", "text": "None"}, {"file_name": "deep/b.png", "text": 'two, "quoted"'}]
    if kind == "jsonl":
        jsonl(tmp_path / "metadata.jsonl", rows)
    else:
        with (tmp_path / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    assert everything(*open_source(config(tmp_path))) == {"a.png": ["None"], "deep/b.png": ['two, "quoted"']}


def test_metadata_with_splits(tmp_path, config, write):
    write(tmp_path, "train/a.png", "validation/a.png")
    for split in ("train", "validation"):
        jsonl(tmp_path / split / "metadata.jsonl", [{"file_name": "a.png", "text": split}])
    train, validation = open_source(config(tmp_path))
    assert (everything(train), everything(validation)) == (
        {"train/a.png": ["train"]},
        {"validation/a.png": ["validation"]},
    )
    assert train.read(0) != validation.read(0)
    for split in ("train", "validation"):
        (tmp_path / split / "metadata.jsonl").unlink()
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": f"{s}/a.png", "text": s} for s in ("train", "validation")])
    assert [everything(source) for source in open_source(config(tmp_path))] == [
        everything(train),
        everything(validation),
    ]


def test_lists_of_captions(tmp_path, config, write):
    write(tmp_path, "a.png", "b.png")
    rows = [
        {"file_name": "a.png", "captions": ["one", " one", "", "two"], "alt": "three"},
        {"file_name": "b.png", "captions": "alone", "alt": None},
    ]
    jsonl(tmp_path / "metadata.jsonl", rows)
    assert everything(*open_source(config(tmp_path))) == {"a.png": ["one", "two"], "b.png": ["alone"]}
    several = open_source(config(tmp_path, caption_columns=("alt", "captions")))
    assert everything(*several) == {"a.png": ["three", "one", "two"], "b.png": ["alone"]}


def test_missing_and_outside_pictures(tmp_path, config, write):
    write(tmp_path, "data/a.png", "secret.png")
    names = ["missing.png", "../secret.png", str(tmp_path / "secret.png")]
    jsonl(tmp_path / "data" / "metadata.jsonl", [{"file_name": name, "text": "x"} for name in names])
    for source in open_source(config(tmp_path / "data")):
        for index in range(len(source)):
            with pytest.raises(PictureError) as error:
                source.read(index)
            assert error.value.reason == "unreadable"


def test_parquet_folder(tmp_path, config, picture):
    root = tmp_path / "some [odd] name"
    parquet(root / "train-00001.parquet", [picture(2), picture(3)], caption=["c", "d"])
    parquet(root / "train-00000.parquet", [picture(0), picture(1)], caption=["a", "b"])
    parquet(root / "validation.parquet", [picture(4)], caption=["e"])
    parquet(root / "test.parquet", [picture(5)], caption=["f"])
    train, validation = open_source(config(root))
    assert everything(train) == {
        "train-00000.parquet row 0": ["a"],
        "train-00000.parquet row 1": ["b"],
        "train-00001.parquet row 0": ["c"],
        "train-00001.parquet row 1": ["d"],
    }
    assert everything(validation) == {"validation.parquet row 0": ["e"]}
    assert [train.read(index) for index in range(4)] == [picture(number) for number in range(4)]


def test_parquet_file_and_glob(tmp_path, config, picture):
    for number in range(3):
        parquet(tmp_path / f"part-{number}.parquet", [picture(number)] * 2, text=["x", "y"])
    assert len(everything(*open_source(config(tmp_path / "part-1.parquet")))) == 2
    assert set(everything(*open_source(config(tmp_path / "part-[01].parquet")))) == {
        f"part-{number}.parquet row {row}" for number in (0, 1) for row in (0, 1)
    }


def test_parquet_with_plain_bytes(tmp_path, config, picture):
    pq.write_table(pa.table({"jpg": [picture(0), None], "prompt": ["a", "b"]}), tmp_path / "x.parquet")
    rows = {s.name(0): s for s in open_source(config(tmp_path))}
    assert rows["x.parquet row 0"].read(0) == picture(0)
    with pytest.raises(PictureError, match="empty"):
        rows["x.parquet row 1"].read(0)


def test_parquet_columns(tmp_path, config, picture):
    cells = [{"bytes": picture(0), "path": None}] * 2
    pq.write_table(pa.table({"a": cells, "b": [1, 2], "c": ["x", "y"]}), tmp_path / "x.parquet")
    with pytest.raises(LatentDiffError, match=r"no picture column among a, b, c"):
        open_source(config(tmp_path))
    with pytest.raises(LatentDiffError, match=r"no caption column among b, c"):
        open_source(config(tmp_path, image_column="a"))
    with pytest.raises(LatentDiffError, match=r"unknown image column .* 'aa': .* did you mean 'a'"):
        open_source(config(tmp_path, image_column="aa"))
    with pytest.raises(LatentDiffError, match=r"unknown caption column .* 'cc': .* did you mean 'c'"):
        open_source(config(tmp_path, image_column="a", caption_columns=("cc",)))
    found = everything(*open_source(config(tmp_path, image_column="a", caption_columns=("c", "b"))))
    assert found == {"x.parquet row 0": ["x", "1"], "x.parquet row 1": ["y", "2"]}


def test_a_damaged_parquet_file(tmp_path, config, picture):
    parquet(tmp_path / "x.parquet", [picture(0)] * 2, text=["a", "b"])
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-9])
    with pytest.raises(LatentDiffError, match=r"x\.parquet: not a valid Parquet file"):
        open_source(config(tmp_path))


def test_builtin(config):
    train, validation = open_source(config("builtin:emoji-mini"))
    assert train.name(17) == "train.parquet row 17"
    assert validation.captions(0)
    with pytest.raises(LatentDiffError, match=r"did you mean 'emoji-mini'"):
        open_source(config("builtin:emoji-mimi"))


@pytest.mark.parametrize(
    ("name", "split"),
    [("train-00000.tar", "train"), ("a/Dev_2.parquet", "validation"), ("my.clean-x.tar", "clean-x"),
     ("trains.parquet", ""), ("constraint.tar", ""), ("testing.tar", "test")],
)  # fmt: skip
def test_split_of_a_file(config, name, split):
    assert split_of_file(name, config("x", train_split="clean-x")) == split


@pytest.mark.parametrize("source", ["owner/name", "s3://bucket/*.parquet"])
def test_remote(config, picture, monkeypatch, source):
    """Sources that `datasets` loads from elsewhere; only the loading is mocked."""
    table = datasets.Dataset.from_dict({"image": [{"bytes": picture(0), "path": None}] * 3, "text": ["a", "b", "c"]})
    splits = datasets.DatasetDict({"train": table.cast_column("image", datasets.Image()), "validation": table})
    calls = []
    monkeypatch.setattr(tables, "load_dataset", lambda *args, **options: calls.append((args, options)) or splits)
    train, validation = open_source(config(source, image_column="image"))
    assert everything(train) == {"train row 0": ["a"], "train row 1": ["b"], "train row 2": ["c"]}
    assert validation.name(2) == "validation row 2"
    assert train.read(1) == picture(0)
    assert calls == [(("parquet",), {"data_files": source}) if "://" in source else ((source,), {})]


def test_hold_out_is_by_name(folder, config, write):
    held = set(open_source(config(folder, validation_share=0.3))[1].names())
    assert 1 <= len(held) <= 7
    for name in ("zz.png", "00a.png"):
        write(folder, name)
        (folder / name).with_suffix(".txt").write_text("more")
    after = set(open_source(config(folder, validation_share=0.3))[1].names())
    assert after - {"zz.png", "00a.png"} == held


def test_hold_out_of_few(folder, config):
    both = open_source(config(folder))[0].select([0, 1])
    for share in (1e-9, 1 - 1e-9):
        assert [len(part) for part in hold_out(both, share)] == [1, 1]
    with pytest.raises(LatentDiffError, match="is 1: too few"):
        hold_out(both.select([0]), 0.5)


def test_select_and_without(folder, config):
    train, _ = open_source(config(folder))
    names = list(train.names())
    assert list(train.select([3, 1]).names()) == [names[3], names[1]]
    assert list(train.without({names[0], "no such"}).names()) == names[1:]
    assert train.without({names[0]}).stat_fingerprint() != train.stat_fingerprint()
    for index in (-1, len(train)):
        with pytest.raises(IndexError):
            train.captions(index)


def test_quarantine(folder, config, tmp_path):
    listed = tmp_path / "quarantine.txt"
    listed.write_text("03.png\ttruncated: cut off\n07.png\n\n")
    assert read_quarantine(listed) == {"03.png", "07.png"}
    left = everything(*open_source(config(folder, quarantine=str(listed))))
    assert set(left) == set(SOME) - {"03.png", "07.png"}
    with pytest.raises(LatentDiffError, match=r"data\.quarantine='nowhere': cannot be read"):
        open_source(config(folder, quarantine="nowhere"))


def test_names_are_single_lines(tmp_path, config, write):
    write(tmp_path, "a\tb\nc.png", "d.png")
    (tmp_path / "d.txt").write_text("x")
    (tmp_path / "a\tb\nc.txt").write_text("y")
    assert everything(*open_source(config(tmp_path))) == {"a b c.png": ["y"], "d.png": ["x"]}


def test_a_name_that_is_not_unicode(tmp_path, config, write, caplog):
    write(tmp_path, "a.png", "b.png", os.fsdecode(b"caf\xe9.png"))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    with caplog.at_level(logging.WARNING):
        assert len(everything(*open_source(config(tmp_path)))) == 2
    assert "caf" in caplog.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "'nowhere': no such file or folder"),
        ("./no/where", "no such file or folder"),
        ("some*.parquet", "no .parquet or .tar files found"),
        ("owner/name", "'owner/name': no such local folder, and it cannot be fetched"),
        ("hf://datasets/owner/name/x.parquet", "cannot be fetched"),
    ],
)
def test_missing_sources_raise(config, source, message):
    with pytest.raises(LatentDiffError) as error:
        open_source(config(source))
    assert message in str(error.value)


def test_empty_sources_raise(tmp_path, config, write):
    with pytest.raises(LatentDiffError, match="contains neither pictures"):
        open_source(config(tmp_path))
    write(tmp_path, "a.png", "b.png")
    with pytest.raises(LatentDiffError, match=r"none of the \d+ pictures in split 'train' has a caption; put cat.txt"):
        open_source(config(tmp_path))
    with pytest.raises(LatentDiffError, match=r"a\.png'?: no .parquet or .tar files"):
        open_source(config(tmp_path / "a.png"))


def test_no_such_split(tmp_path, config, write):
    write(tmp_path, "val/a.png")
    with pytest.raises(LatentDiffError, match=r"train_split='train'; found: validation"):
        open_source(config(tmp_path))


def test_broken_captions(tmp_path, config, write):
    write(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "te')
    with pytest.raises(LatentDiffError, match=r"metadata\.jsonl line 1: not valid JSON"):
        open_source(config(tmp_path))
    jsonl(tmp_path / "metadata.jsonl", [{"name": "a.png", "text": "x"}])
    with pytest.raises(LatentDiffError, match=r"unknown column .*'file_name': choose one of name, text"):
        open_source(config(tmp_path))


def test_the_progress_bar_setting_is_restored(folder, config, capfd):
    before = is_progress_bar_enabled()
    open_source(config(folder))
    assert is_progress_bar_enabled() == before
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_source_pickles_to_a_few_bytes(folder, config, tmp_path):
    """As when it is sent to the spawned workers of a DataLoader."""
    train, _ = open_source(config(folder))
    data = pickle.dumps(train)
    assert len(data) < 20_000
    (tmp_path / "source").write_bytes(data)
    code = (
        "import pickle, sys; s = pickle.load(open(sys.argv[1], 'rb')); print(s.name(1), s.captions(1), len(s.read(1)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "source"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == f"{train.name(1)} {train.captions(1)} {len(train.read(1))}"
