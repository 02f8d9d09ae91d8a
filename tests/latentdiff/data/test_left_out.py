"""Folders as people have them: every file is used, or named with the reason, by the check and by training alike."""

import json
import os
import shutil
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentdiff.data.check import check_source
from latentdiff.data.left_out import LeftOut
from latentdiff.data.sources import open_source
from latentdiff.errors import LatentDiffError
from latentdiff.training.stages import open_pictures


def opened(config):
    """What is used, by name, and what is not, by reason."""
    left_out = LeftOut()
    sources = open_source(config, left_out)
    found = {s.name(index): s.captions(index) for s in sources for index in range(len(s))}
    return found, left_out


def write_text(root, name, text="x"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def pictures(write):
    """Write pictures with captions of their names."""

    def make(root, *names):
        write(root, *names)
        for name in names:
            write_text(root, f"{name.rpartition('.')[0]}.txt", f"about {name}")

    return make


@pytest.mark.parametrize("hidden", ["._a.png", ".Trash-1000/files/b.png", ".cache/c.png", ".ipynb_checkpoints/d.png",
                                    "$RECYCLE.BIN/e.png", "__MACOSX/f.png", "@eaDir/g.png", "Thumbs.db"])  # fmt: skip
def test_hidden_files_and_trash(tmp_path, config, pictures, write, hidden):
    pictures(tmp_path, "1.png", "2.png")
    write(tmp_path, hidden)
    found, left_out = opened(config(tmp_path))
    assert set(found) == {"1.png", "2.png"}
    ((reason, names),) = left_out.names.items()
    assert "hidden" in reason
    assert names == [hidden.split("/")[0]]


def parquet(path, pictures=None, rows=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = (
        {"image": [{"bytes": data, "path": None} for data in pictures]} if pictures else {"value": list(range(rows))}
    )
    pq.write_table(pa.table({**cells, "text": ["from a table"] * rows}), path)


def test_hidden_shards_are_passed_over(tmp_path, config, picture):
    parquet(tmp_path / "train.parquet", [picture(number) for number in range(3)])
    write_text(tmp_path, "._train.parquet", b"\0\5\x16\7")
    parquet(tmp_path / ".old/train.parquet", [picture(9)] * 3)
    found, left_out = opened(config(tmp_path))
    assert len(found) == 3
    assert sum(map(len, left_out.names.values())) == 2


@pytest.mark.parametrize("stray", ["backup.tar", "embeddings.parquet", "old/backup.TAR"])
def test_a_stray_shard_beside_captioned_pictures(tmp_path, config, pictures, stray):
    pictures(tmp_path, "1.png", "2.png")
    write_text(tmp_path, stray, b"?")
    found, left_out = opened(config(tmp_path))
    assert set(found) == {"1.png", "2.png"}
    assert left_out.names == {"Parquet and tar files beside pictures with captions": [stray]}


def test_pictures_beside_shards(tmp_path, config, picture, write):
    """A logo does not replace the data set, and a table without pictures is named."""
    parquet(tmp_path / "train.PARQUET", [picture(number) for number in range(3)])
    parquet(tmp_path / "scores.parquet")
    write(tmp_path, "logo.png")
    found, left_out = opened(config(tmp_path))
    assert set(found.values().__iter__().__next__()) == {"from a table"}
    assert len(found) == 3
    assert left_out.names == {"pictures without captions beside Parquet and tar files": ["logo.png"],
                              "tables without pictures": ["scores.parquet"]}  # fmt: skip


def test_outputs_of_latentdiff(tmp_path, config, pictures, write):
    """A run inside the source, its own contact sheet, and what it draws are no training pictures."""
    pictures(tmp_path, "1.png", "2.png")
    first = opened(config(tmp_path))[0]
    check_source(config(tmp_path), tmp_path / "data-check")
    write(tmp_path, "run/train_latent/samples/step-1.png", "run/train_vae/reconstructions/step-1.png")
    write_text(tmp_path, "run/run.json", "{}")
    info = PngInfo()
    info.add_text("latentdiff", json.dumps({"prompt": "x" * 5000, "guidance_scale": 5.0}))
    (tmp_path / "samples").mkdir()
    for name in ("0001-a-cat.png", "0002-a-dog.png"):
        Image.new("RGB", (20, 20)).save(tmp_path / "samples" / name, pnginfo=info)
    Image.new("RGB", (20, 20)).save(tmp_path / "samples/grid.png")
    write(tmp_path, f"evaluation/drawn/{'0a' * 6}/{'1b' * 10}.png", "evaluation/copies.png", "evaluation/concepts.png")
    write_text(tmp_path, "evaluation/evaluation.json", "{}")
    write(tmp_path, "0001-not-ours.png")
    found, left_out = opened(config(tmp_path))
    assert set(found) == set(first) | {"0001-not-ours.png"}
    (own,) = (names for reason, names in left_out.names.items() if "written by latentdiff" in reason)
    assert {"run/", "data-check/contact_sheet.png", "samples/0001-a-cat.png", "samples/grid.png"} <= set(own)


def test_linked_folders(tmp_path, config, pictures):
    """Each real folder once, under its own name where it has one; a loop ends."""
    pictures(tmp_path / "here", "1.png", "z/2.png")
    pictures(tmp_path / "far", "3.png")
    (tmp_path / "here/a link").symlink_to(tmp_path / "far")
    (tmp_path / "here/again").symlink_to(tmp_path / "here/z")
    (tmp_path / "here/loop").symlink_to(tmp_path / "here")
    (tmp_path / "here/nowhere").symlink_to(tmp_path / "no such place")
    found, left_out = opened(config(tmp_path / "here"))
    assert set(found) == {"1.png", "z/2.png", "a link/3.png"}
    assert left_out.names == {"links that lead nowhere": ["nowhere"],
                              "linked folders that are read already": ["again/", "loop/"]}  # fmt: skip


def test_class_folders_called_like_splits(tmp_path, config, pictures):
    pictures(tmp_path / "a", "car/1.png", "train/1.png", "plane/1.png")
    found, left_out = opened(config(tmp_path / "a"))
    assert len(found) == 3
    assert any("called like a split" in line for line in left_out.lines())
    pictures(tmp_path / "b", "glass/1.png", "glass/2.png", "test/1.png")
    found, left_out = opened(config(tmp_path / "b"))  # of two, `test` may well be held back
    assert len(found) == 2
    assert left_out.names == {"pictures in the split 'test', which is not used": ["test/1.png"]}
    pictures(tmp_path / "d", "glass/1.png", "metal/1.png", "test/1.png")
    assert len(opened(config(tmp_path / "d"))[0]) == 3
    pictures(tmp_path / "c", "train/1.png", "val/1.png", "extra/1.png")
    found, left_out = opened(config(tmp_path / "c"))
    assert len(found) == 2
    assert left_out.names == {"pictures in no split": ["extra/1.png"]}


def test_formats_and_texts(tmp_path, config, pictures, write):
    pictures(tmp_path, "1.png", "2.JPG")
    os.rename(tmp_path / "2.txt", tmp_path / "2.TXT")
    for name in ("a.avif", "b.HEIC", "c.zip", "notes.md", "orphan.txt", "1.TXT"):
        write_text(tmp_path, name)
    found, left_out = opened(config(tmp_path))
    assert found == {"1.png": ["about 1.png"], "2.JPG": ["about 2.JPG"]}
    assert sorted(name for names in left_out.names.values() for name in names) == [
        "1.TXT", "a.avif", "b.HEIC", "c.zip", "notes.md", "orphan.txt"]  # fmt: skip
    assert any(
        line.startswith("left out: pictures in formats that are not read (convert them to PNG, JPEG or WebP): 2 (a")
        for line in left_out.lines()
    )


def test_a_folder_of_unread_formats_says_so(tmp_path, config):
    write_text(tmp_path, "a.heic")
    with pytest.raises(
        LatentDiffError, match=r"contains neither pictures .* left out: pictures in formats .*: 1 \(a\.heic\)"
    ):
        open_source(config(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(tmp_path, config, pictures, encoding):
    pictures(tmp_path, "1.png", "2.png")
    text = "ein Bär\r\n\r\npage\u2028break\x0b\x0c\x85 stays\rthird"
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    write_text(tmp_path, "1.txt", mark + text.encode(encoding))
    found, left_out = opened(config(tmp_path))
    assert found["1.png"] == ["ein Bär", "page\u2028break\x0b\x0c\x85 stays", "third"]
    remarks = [f"caption files in {encoding[:6].upper()}: 1 (1.txt)"] if encoding[4:6] in ("16", "32") else []
    assert [line for line in left_out.lines() if "1.txt" in line] == remarks


def test_captions_that_cannot_be_decoded(tmp_path, config, pictures):
    """Their pictures are left out, like broken ones, and all are named, also when the table comes from the cache."""
    pictures(tmp_path, *(f"{number}.png" for number in range(5)))
    write_text(tmp_path, "1.txt", b"caf\xe9")
    write_text(tmp_path, "3.txt", "it’s".encode("cp1252"))
    for _ in range(2):
        found, left_out = opened(config(tmp_path))
        assert set(found) == {"0.png", "2.png", "4.png"}
        assert left_out.names == {"pictures whose caption is not UTF-8": ["1.png (1.txt)", "3.png (3.txt)"]}
    report = check_source(config(tmp_path), tmp_path / "out")
    assert report.left_out["pictures whose caption is not UTF-8"] == ["1.png (1.txt)", "3.png (3.txt)"]
    assert any("3.png (3.txt)" in line for line in report.lines())


VALUES = ["001", "1.50", "2020-01-01", "1e5", "None", "NaN", "true", "00:30", "12345678901234567890", "-0"]


@pytest.mark.parametrize("kind", ["csv", "jsonl text", "jsonl numbers", "csv with a mark"])
def test_values_stay_as_written(tmp_path, config, write, kind):
    write(tmp_path, *(f"{number}.png" for number in range(len(VALUES))))
    numbers = [v for v in VALUES if v in ("1.50", "12345678901234567890", "-0", "true", "1e5")]
    if "csv" in kind:
        lines = ["file_name,text", *(f"{number}.png,{value}" for number, value in enumerate(VALUES))]
        write_text(tmp_path, "metadata.csv", ("\ufeff" if "mark" in kind else "") + "\r\n".join(lines))
        expected = VALUES
    else:
        expected = VALUES if "text" in kind else numbers
        shown = [json.dumps(value) if "text" in kind else value for value in expected]
        write_text(tmp_path, "metadata.jsonl", "\n".join(
            f'{{"file_name": "{number}.png", "text": {value}, "other": {number % 2 or "[]"}}}'
            for number, value in enumerate(shown)))  # fmt: skip
    found, _ = opened(config(tmp_path))
    assert found == {f"{number}.png": [value] for number, value in enumerate(expected)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metadata.csv",
            "file_name,text\n1.png,a cat, red\n",
            r"metadata\.csv line 2: 3 values for 2 columns; .*quotes",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "1.png", "text": {"en": "x"}}\n',
            r"metadata\.jsonl: 1\.png: caption .*not dict",
        ),
        ("metadata.jsonl", '[{"file_name": "1.png"}]\n', r"metadata\.jsonl line 1: expected an object"),
        ("metadata.jsonl", '{"file_name": null, "text": "x"}\n', r"metadata\.jsonl: file_name=None"),
        ("metadata.csv", b"file_name,text\n1.png,caf\xe9\n", r"metadata\.csv: neither UTF-8 nor marked"),
        ("metadata.csv", "file_name,text,text\n1.png,a,b\n", r"metadata\.csv line 1: the column 'text' is there twice"),
        ("metadata.csv", 'file_name,text\n1.png,"a"b"\n', r"metadata\.csv line 2: not valid CSV"),
        ("metadata.csv", "file_name,text\n1.png,a\0b\n", r"metadata\.csv line 2: 'a\\x00b' is not valid text"),
        ("metadata.csv", "file_name,text\n", r"metadata\.csv: has no rows"),
        (
            "metadata.jsonl",
            '{"file_name": "1.png", "text": "a", "text": "b"}\n',
            r"metadata\.jsonl line 1: not valid JSON \(the key 'text' is there twice\)",
        ),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "\\u0000"}\n', r"metadata\.jsonl line 1: .*not valid text"),
    ],
)
def test_tables_that_are_not_what_they_should_be(tmp_path, config, write, name, text, message):
    write(tmp_path, "1.png", "2.png")
    write_text(tmp_path, name, text)
    with pytest.raises(LatentDiffError, match=message):
        open_source(config(tmp_path))


def test_a_second_column_of_captions_is_named(tmp_path, config, write):
    write(tmp_path, "1.png", "2.png", "3.png")
    rows = [{"file_name": f"{name}.png", key: name} for name, key in (("1", "text"), ("2", "caption"), ("3", "text"))]
    write_text(tmp_path, "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    found, left_out = opened(config(tmp_path))
    assert found == {"1.png": ["1"], "2.png": [], "3.png": ["3"]}
    assert list(left_out.remarks.values()) == [["caption of metadata.jsonl"]]
    found, left_out = opened(config(tmp_path, caption_columns=("text", "caption")))
    assert (found, left_out.remarks) == ({"1.png": ["1"], "2.png": ["2"], "3.png": ["3"]}, {})


def test_missing_values_and_odd_links(tmp_path, config, write):
    """NaN is no caption, `./` and `../` are resolved, and one entry that cannot be looked at costs nothing else."""
    write(tmp_path, "pictures/train/1.png", "pictures/val/2.png")
    rows = '{"file_name": "./train/1.png", "text": "one"}\n{"file_name": "sub/../val/2.png", "text": ["two", NaN]}'
    write_text(tmp_path, "pictures/metadata.jsonl", rows)
    (tmp_path / "pictures/itself").symlink_to(tmp_path / "pictures/itself")
    left_out = LeftOut()
    train, held_out = open_source(config(tmp_path / "pictures"), left_out)
    assert (list(train.names()), list(held_out.names())) == (["train/1.png"], ["val/2.png"])
    assert held_out.captions(0) == ["two"]
    assert any("itself" in names for names in left_out.names.values())


def test_tables_from_windows_and_in_subfolders(tmp_path, config, write):
    write(tmp_path / "win", "sub/1.png", "sub/2.png")
    write_text(tmp_path / "win", "metadata.csv", "file_name,text\nsub\\1.png,a\nsub\\2.png,b\n")
    assert opened(config(tmp_path / "win"))[0] == {"sub/1.png": ["a"], "sub/2.png": ["b"]}
    write(tmp_path / "two", "cats/1.png", "dogs/deep/1.png", "dogs/deep/2.png", "loose.png")
    write_text(tmp_path / "two", "cats/metadata.jsonl", '{"file_name": "1.png", "text": "cat"}')
    write_text(tmp_path / "two", "dogs/metadata.csv", "file_name,caption\ndeep/1.png,dog")
    write_text(tmp_path / "two", "dogs/deep/metadata.csv", "file_name,caption\n1.png,hidden by the one above")
    found, left_out = opened(config(tmp_path / "two"))
    assert found == {"cats/1.png": ["cat"], "dogs/deep/1.png": ["dog"]}
    assert left_out.names == {"tables below the folder of another": ["dogs/deep/metadata.csv"],
                              "pictures that no table names": ["loose.png", "dogs/deep/2.png"]}  # fmt: skip


def test_a_picture_without_a_caption_is_not_held_out(tmp_path, config, pictures, write):
    pictures(tmp_path, "1.png", "2.png", "3.png")
    write(tmp_path, *(f"without {number}.png" for number in range(40)))
    for share in (0.05, 0.5, 0.99):
        train, held_out = open_source(config(tmp_path, validation_share=share))
        assert all(held_out.all_captions())
        assert any(train.all_captions())
        assert len(train) + len(held_out) == 43


def test_an_unwritable_cache_is_named(tmp_path, config, pictures, monkeypatch):
    pictures(tmp_path / "pictures", "1.png", "2.png")
    write_text(tmp_path, "file", "")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/cache")
    with pytest.raises(
        LatentDiffError, match=r"file/cache: cannot be written .*HF_DATASETS_CACHE, or HF_HOME"
    ) as failure:
        open_source(config(tmp_path / "pictures"))
    assert "data.source" not in str(failure.value)


KINDS = ["picture", "caption", "capital", "broken", "empty", "hidden", "linked", "linked picture", "nowhere", "pipe",
         "foreign", "undecodable", "orphan", "archive", "shard"]  # fmt: skip
NAMES = st.text("ab#é €'[", min_size=1, max_size=6).filter(lambda name: name.strip() == name)


@pytest.mark.parametrize("size", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_every_file_is_used_or_named(tmp_path_factory, config, picture, size):
    """Whatever lies in a folder, nothing is lost in silence; the check and the training say the same."""
    names = st.dictionaries(NAMES, st.sampled_from(KINDS), min_size=1, max_size=10)

    @settings(max_examples=size, deadline=None, database=None)
    @given(files=names, folder=st.sampled_from(["", "in/"]))
    def check(files, folder):
        check_any_folder(tmp_path_factory, config, picture, files, folder)

    check()


def check_any_folder(tmp_path_factory, config, picture, files, folder):
    root = tmp_path_factory.mktemp("any")
    write_text(root, "first.png", picture(0)), write_text(root, "first.txt", "one")
    write_text(root, "second.png", picture(1)), write_text(root, "second.txt", "two")
    expected_used = {"first.png", "second.png"}
    for number, (name, kind) in enumerate(files.items()):
        stem = f"{folder}{name}"
        if kind in ("picture", "caption", "capital", "broken", "empty", "undecodable"):
            write_text(root, f"{stem}.png", {"broken": b"no picture", "empty": b""}.get(kind, picture(number)))
            expected_used |= {f"{stem}.png"} if kind != "undecodable" else set()
        extra = {"caption": (".txt", b"a"), "capital": (".TXT", b"b"), "undecodable": (".txt", b"\xff\xfea"),
                 "orphan": (".txt", b"c"), "foreign": (".avif", b"d"), "archive": (".zip", b"e"),
                 "shard": (".tar", b"g")}.get(kind)  # fmt: skip
        if kind == "undecodable":
            extra = (".txt", b"caf\xe9 ")
        if extra:
            write_text(root, stem + extra[0], extra[1])
        if kind == "hidden":
            write_text(root, f"{folder}.{name}", b"f")
        (root / folder).mkdir(exist_ok=True)
        if kind == "linked picture":
            (root / f"{stem}.png").symlink_to(root / "first.png")
            expected_used |= {f"{stem}.png"}
        if kind == "nowhere":
            (root / f"{stem}.png").symlink_to(root / "no such file")
        if kind == "pipe":
            os.mkfifo(root / f"{stem}.png")
        if kind == "linked":
            (root / f"{stem}").symlink_to(root)
    try:
        used, left_out = opened(config(root))
        assert set(used) == expected_used
        named = {name for names in left_out.names.values() for name in names}
        for path in root.rglob("*"):
            name = path.relative_to(root).as_posix()
            is_caption = path.suffix.lower() == ".txt" and any(f"{name[:-4]}{end}" in used for end in (".png",))
            where = [
                name,
                f"{name}/",
                *(entry for entry in named if f"({name})" in entry or entry.startswith(f"{name} (")),
            ]
            inside_a_link = any(parent.is_symlink() for parent in path.parents)
            assert (
                (path.is_dir() and not path.is_symlink())
                or inside_a_link
                or name in used
                or is_caption
                or named & set(where)
            )
        report = check_source(config(root), root.parent / f"{root.name}-out")
        assert report.left_out == left_out.names
        assert report.train.pictures + report.validation.pictures == len(used)
        listed = (root.parent / f"{root.name}-out/quarantine.txt").read_text(encoding="utf-8").splitlines()
        assert {line.split("\t")[0] for line in listed} == {
            f"{folder}{name}.png" for name, kind in files.items() if kind in ("broken", "empty")
        }
        said = []  # by a training, before its first step
        run = SimpleNamespace(config=SimpleNamespace(data=config(root)), say_once=said.append, pictures={})
        open_pictures(run)
        assert run.pictures["left_out"] == list(left_out.lines())
        assert said[: len(list(left_out.lines()))] == [f"{root}: {line}" for line in left_out.lines()]
        assert set(left_out.lines()) <= set(report.lines())
    finally:
        shutil.rmtree(root)
