import io
import json
import logging
import tarfile

import pytest

from latentdiff.data.sources import open_source
from latentdiff.errors import LatentDiffError


def write_tar(path, members):
    """Write a shard from (name, bytes) pairs or TarInfos; returns the offset of each header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    offsets = []
    with tarfile.open(path, "w") as archive:
        for member in members:
            offsets.append(archive.offset)
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return offsets


@pytest.fixture
def samples(picture):
    """Members of `count` samples, numbered from `first`."""

    def make(first, count):
        members = []
        for number in range(first, first + count):
            members += [(f"{number:03}.png", picture(number)), (f"{number:03}.txt", f"number {number}".encode())]
        return members

    return make


def everything(*sources):
    return {source.name(index): source.captions(index) for source in sources for index in range(len(source))}


def test_shards(tmp_path, config, samples, picture):
    write_tar(tmp_path / "train-0.tar", samples(0, 2))
    write_tar(tmp_path / "train-1.tar", samples(0, 1))
    write_tar(tmp_path / "val.tar", samples(5, 1))
    train, validation = open_source(config(tmp_path))
    assert everything(train) == {
        "train-0.tar/000.png": ["number 0"],
        "train-0.tar/001.png": ["number 1"],
        "train-1.tar/000.png": ["number 0"],
    }
    assert [train.read(index) for index in range(3)] == [picture(0), picture(1), picture(0)]
    assert validation.read(0) == picture(5)


def test_json_and_several_captions(tmp_path, config, picture):
    captions = json.dumps({"caption": ["one", "two"], "prompt": "three", "id": 4}).encode()
    write_tar(tmp_path / "a.tar", [("x/0.b.json", b"[1]"), ("x/0.jpg", picture(0)), ("x/0.json", captions),
                                   ("x/1.JPG", picture(1)), ("x/1.txt", b"\xef\xbb\xbfone\ntwo\n")])  # fmt: skip
    found = everything(*open_source(config(tmp_path / "a.tar")))
    assert found == {"a.tar/x/0.jpg": ["one", "two", "three"], "a.tar/x/1.JPG": ["one", "two"]}
    found = everything(*open_source(config(tmp_path / "*.tar", caption_columns=("prompt", "txt"))))
    assert found == {"a.tar/x/0.jpg": ["three"], "a.tar/x/1.JPG": ["one", "two"]}


@pytest.mark.parametrize(
    "cut", ["in the picture", "in the header", "in the text", "between picture and text", "before the end marker"]
)
def test_a_truncated_shard_yields_its_intact_samples(tmp_path, config, samples, caplog, cut):
    shard = tmp_path / "a.tar"
    offsets = write_tar(shard, samples(0, 3))
    end = {
        "in the picture": offsets[4] + 600,
        "in the header": offsets[4] + 100,
        "in the text": offsets[5] + 512 + 3,
        "between picture and text": offsets[5],
        "before the end marker": offsets[5] + 1024,
    }[cut]
    shard.write_bytes(shard.read_bytes()[:end])
    write_tar(tmp_path / "b.tar", samples(2, 2))
    intact = 3 if cut == "before the end marker" else 2
    expected = {f"a.tar/{number:03}.png": [f"number {number}"] for number in range(intact)}
    expected |= {f"b.tar/{number:03}.png": [f"number {number}"] for number in (2, 3)}
    for _ in range(2):  # the second time, from the cache of `datasets`
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert everything(*open_source(config(tmp_path))) == expected
        assert sum("damaged" in message for message in caplog.messages) == 1
        assert "tar files that are damaged, and only read up to the damage" in caplog.text
        assert "(a.tar)" in caplog.text


def test_a_broken_header(tmp_path, config, samples, caplog):
    shard = tmp_path / "a.tar"
    offsets = write_tar(shard, samples(0, 4))
    data = bytearray(shard.read_bytes())
    data[offsets[4] : offsets[4] + 200] = b"\xaa" * 200
    shard.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert set(everything(*open_source(config(shard)))) == {"a.tar/000.png", "a.tar/001.png"}
    assert f"end-of-archive marker at byte {offsets[4]}" in caplog.text


@pytest.mark.parametrize("data", [b"", b"not a tar file" * 100])
def test_not_a_tar_file(tmp_path, config, samples, caplog, data):
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(LatentDiffError, match=r"no pictures in bad\.tar"):
        open_source(config(tmp_path))
    write_tar(tmp_path / "good.tar", samples(0, 2))
    with caplog.at_level(logging.WARNING):
        assert len(everything(*open_source(config(tmp_path)))) == 2
    assert "damaged" in caplog.text
    assert "bad.tar" in caplog.text


def test_an_empty_shard(tmp_path, config):
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(LatentDiffError, match=r"no pictures in a\.tar; left out: tar files without .* 1 \(a\.tar\)"):
        open_source(config(tmp_path))


def test_links_devices_and_surplus_members_are_skipped(tmp_path, config, samples, picture, caplog):
    link, device, folder = (tarfile.TarInfo(name) for name in ("link.png", "device.png", "folder"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type, folder.type = tarfile.CHRTYPE, tarfile.DIRTYPE
    hard, sparse = tarfile.TarInfo("hard.png"), tarfile.TarInfo("sparse.png")
    hard.type, hard.linkname, sparse.type = tarfile.LNKTYPE, "/etc/passwd", tarfile.GNUTYPE_SPARSE
    bad = [link, device, folder, hard, sparse, ("/abs.png", picture(1)), ("../up.png", picture(1))]
    odd = [("000.jpg", picture(7)), ("only.txt", b"not a picture"), ("001.json", b"{"), ("001.txt.gz", b"?")]
    write_tar(tmp_path / "a.tar", [*bad, *samples(0, 2), *odd])
    with caplog.at_level(logging.WARNING):
        train, validation = open_source(config(tmp_path))
    assert everything(train, validation) == {"a.tar/000.png": ["number 0"], "a.tar/001.png": ["number 1"]}
    assert "left out: links, devices or paths outside the shard: 6 (a.tar/../up.png, " in caplog.text
    assert "left out: surplus pictures of a sample: 1 (a.tar/000.jpg)" in caplog.text
    assert "left out: caption files that are too long, not UTF-8 or not JSON: 1 (a.tar/001.json)" in caplog.text
    assert "left out: samples without a picture or truncated: 1 (a.tar/only)" in caplog.text
    assert "left out: members that are neither pictures nor captions: 1 (a.tar/001.txt.gz)" in caplog.text


def test_a_shard_truncated_after_opening(tmp_path, config, samples):
    shard = tmp_path / "a.tar"
    write_tar(shard, samples(0, 2))
    sources = open_source(config(shard))
    shard.write_bytes(shard.read_bytes()[:1000])
    for source in sources:
        with pytest.raises(LatentDiffError, match=r"truncated: .*a\.tar ends before byte"):
            source.read(0)


def test_mixed_shards(tmp_path, config, samples):
    write_tar(tmp_path / "a.tar", samples(0, 2))
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(LatentDiffError, match=r"both \.parquet and \.tar files"):
        open_source(config(tmp_path))
