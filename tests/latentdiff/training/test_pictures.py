"""Pictures that are broken, odd, or without a usable caption: none is left out of a run in silence."""

import shutil
from pathlib import Path

ALL_PICTURES = ("train_vae.steps=8", "train_vae.batch_size=8", "train_vae.micro_batch_size=4")


def test_five_percent_of_broken_pictures(train, said, pictures, uninterrupted, tmp_path):
    """Truncated, empty, CMYK, 16 bit, palette, animated, a 30,000 x 30,000 header: the run lists the broken ones."""
    folder = tmp_path / "pictures"
    broken = spoil(folder)
    shutil.copytree(pictures / "validation", folder / "validation")
    (folder / "validation" / "metadata.jsonl").unlink()
    for path in list((folder / "validation").iterdir()):
        path.with_suffix(".txt").write_text("held out")
    (folder / "train/00.txt").write_text("much too long " * 99)
    (folder / "train/01.txt").write_text("")
    assert train("run", f"data.source={folder}", "data.max_broken=0.2", *ALL_PICTURES) == 0, said("run")
    lines = said("run").splitlines()
    names = "train/" + ", train/".join(sorted(name.removeprefix("train/") for name in broken))
    for line in (f"3 of 60 pictures in train are broken and not used: {names}; `latentdiff data check` says why",
                 "1 of 60 training pictures have no caption: train/01.png",
                 "1 of 60 training pictures have captions of more than 16 tokens, the text encoder's maximum, and lose "
                 "the rest: train/00.png",
                 "only 6 of 66 pictures held out, so that the validation loss says little; data.validation_share sets "
                 "how many"):  # fmt: skip
        assert lines.count(f"{folder}: {line}") == 1, said("run")
    listed = dict(
        line.split("\t") for line in (tmp_path / "run" / "train_vae" / "broken-0.txt").read_text().splitlines()
    )
    assert listed.keys() == broken
    assert listed["train/header.png"] == "too large"
    assert train("strict", f"data.source={folder}", "data.max_broken=0.01", *ALL_PICTURES) == 1
    assert "more than data.max_broken=0.01 allows" in said("strict")
    peaks = [int(line.split()[-1]) for line in said("run").splitlines() if line.startswith("peak memory")]
    whole = Path(f"{uninterrupted('fp32')}.0.log").read_text().splitlines()
    usual = [int(line.split()[-1]) for line in whole if line.startswith("peak memory")]
    assert peaks[0] < usual[0] + 60 * 1024  # KiB; the header alone claims 2.7 GB


def spoil(folder):
    """60 pictures, of which three cannot be read, and five are unusual."""
    import io
    import struct
    import zlib

    import numpy as np
    from PIL import Image

    train_folder = folder / "train"
    train_folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(52):
        Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(train_folder / f"{number:02}.png")
    pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.convert("CMYK").save(train_folder / "cmyk.jpg")
    Image.fromarray(random.integers(0, 65535, (40, 40), dtype=np.uint16)).save(train_folder / "16bit.png")
    image.convert("P").save(train_folder / "palette.png", transparency=0)
    image.save(train_folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    image.convert("LA").save(train_folder / "grey.png")
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    (train_folder / "truncated.png").write_bytes(encoded.getvalue()[:-600])
    (train_folder / "empty.png").write_bytes(b"")
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (train_folder / "header.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + encoded.getvalue()[33:])
    for path in list(train_folder.iterdir()):
        path.with_suffix(".txt").write_text(f"a picture called {path.stem}")
    return {"train/truncated.png", "train/empty.png", "train/header.png"}
