import io
import json
import zlib

import pytest
from PIL import Image
from transformers import BertTokenizerFast

from latentdiff.data.check import check_source
from latentdiff.data.sources import open_source, read_quarantine
from latentdiff.errors import LatentDiffError


def broken(picture):
    """Broken pictures by reason, among them a header that claims 900 million pixels."""
    header = bytearray(picture(90))
    header[16:24] = (30_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    deep = io.BytesIO()
    Image.new("F", (20, 20)).save(deep, "TIFF")
    large = io.BytesIO()
    Image.new("L", (101, 100)).save(large, "PNG")
    return {
        "truncated": [picture(91)[:-300], picture(92, "JPEG")[:-40]],
        "unreadable": [b""],
        "too large": [large.getvalue(), bytes(header)],
        "too small": [picture(93, size=(40, 15))],
        "format": [b"not a picture", deep.getvalue()],
    }


@pytest.fixture
def folder(tmp_path, picture, config):
    """Eight intact pictures with captions in train, two in validation; broken ones, duplicates, an empty caption."""
    root = tmp_path / "source"
    files = {f"train/{number}.png": picture(number) for number in range(8)}
    files |= {f"validation/{number}.png": picture(number) for number in (8, 9)}
    files |= {"train/copy.png": picture(3), "validation/copy.png": picture(4)}
    files |= {f"train/{reason} {number}.png": data for reason, several in broken(picture).items()
              for number, data in enumerate(several)}  # fmt: skip
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
        (root / name).with_suffix(".txt").write_text("a cat\na b c d e f g")
    (root / "train/0.txt").write_text(" \n")
    (root / "train/1.txt").write_text("a cat\na b c d e f")  # just fits
    return root


@pytest.fixture
def tokenizer():
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg", "cat"]
    return BertTokenizerFast(vocab={name: index for index, name in enumerate(names)}, model_max_length=8)


def test_report(folder, config, tmp_path, tokenizer, picture):
    report = check_source(config(folder, max_pixels=10_000), tmp_path / "out", tokenizer)
    assert (report.train.pictures, report.validation.pictures) == (17, 3)
    assert report.train.broken == {reason: len(several) for reason, several in broken(picture).items()}
    assert report.validation.broken == {}
    assert (report.train.captions, report.train.without_caption) == (32, 1)
    assert (report.train.overlong_captions, report.validation.overlong_captions) == (15, 3)
    assert (report.train.caption_tokens.least, report.train.caption_tokens.largest) == (4, 9)
    assert (report.train.caption_characters.least, report.train.caption_characters.largest) == (5, 13)
    assert (report.duplicates, report.shared) == (2, 1)
    assert report.duplicate_names == (("train/copy.png", "train/3.png"), ("validation/copy.png", "train/4.png"))
    first = "train: 17 pictures, of them broken: 2 format, 2 too large, 1 too small, 2 truncated, 1 unreadable"
    assert first in report.lines()


def test_sizes(config, tmp_path, picture):
    for number, size in enumerate([(16, 16), (40, 20), (30, 60)]):
        (tmp_path / f"{number}.png").write_bytes(picture(number, size=size))
        (tmp_path / f"{number}.txt").write_text("x")
    (tmp_path / "val").mkdir()
    (tmp_path / "val/x.png").write_bytes(picture(9))
    (tmp_path / "val/x.txt").write_text("x")
    train = check_source(config(tmp_path), tmp_path / "out").train
    assert (train.shorter_side.least, train.shorter_side.median, train.shorter_side.largest) == (16, 20, 30)
    assert (train.aspect_ratio.least, train.aspect_ratio.median, train.aspect_ratio.largest) == (0.5, 1, 2)


def test_files_written(folder, config, tmp_path):
    report = check_source(config(folder), tmp_path / "out")
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert written["train"]["broken"] == report.train.broken
    assert written["duplicate_names"][0] == ["train/copy.png", "train/3.png"]
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        colors = sheet.convert("RGB").getcolors(maxcolors=1 << 20)
    assert len(colors) > 1000  # noise, not a blank sheet


def test_quarantine_excludes_exactly_the_broken_pictures(folder, config, tmp_path):
    quarantine = tmp_path / "out/quarantine.txt"
    report = check_source(config(folder, max_pixels=10_000), tmp_path / "out")
    assert report.quarantined == len(read_quarantine(quarantine)) == sum(report.train.broken.values())
    train, validation = open_source(config(folder, max_pixels=10_000, quarantine=str(quarantine)))
    names = {*train.names(), *validation.names()}
    assert {f"train/{number}.png" for number in range(8)} < names
    assert not any(reason in name for name in names for reason in report.train.broken)
    again = check_source(config(folder, max_pixels=10_000, quarantine=str(quarantine)), tmp_path / "again")
    assert again.quarantined == report.quarantined  # the check covers the entire source, whatever the quarantine


def test_duplicates_are_not_quarantined(folder, config, tmp_path):
    check_source(config(folder), tmp_path / "out")
    assert not {"train/copy.png", "validation/copy.png"} & read_quarantine(tmp_path / "out/quarantine.txt")


def test_without_a_tokenizer_it_says_so(folder, config, tmp_path, tokenizer):
    report = check_source(config(folder), tmp_path / "out")
    assert report.train.overlong_captions is None
    assert sum("not checked" in line for line in report.lines()) == 2
    endless = BertTokenizerFast(vocab=tokenizer.get_vocab())
    assert check_source(config(folder), tmp_path / "out", endless).max_tokens is None


def test_all_pictures_broken(config, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"?")
        (tmp_path / f"{number}.txt").write_text("x")
    report = check_source(config(tmp_path), tmp_path / "out")
    assert report.quarantined == 3
    assert report.duplicates == 0
    assert report.train.shorter_side is None
    assert report.lines()
    assert (tmp_path / "out/contact_sheet.png").is_file()


def test_no_source(config, tmp_path):
    with pytest.raises(LatentDiffError, match="no such file or folder"):
        check_source(config("nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
