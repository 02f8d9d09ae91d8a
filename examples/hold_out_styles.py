"""Hold out one style of some things, so that validation asks for known words in combinations never shown.

    python examples/hold_out_styles.py emoji/train.parquet pictures/emoji-256

Takes Parquet files with the columns `image`, `text`, `name` (what is shown) and `style`, and writes `train.parquet` and
`validation.parquet`. A hash of its name decides whether a thing with pictures in every style gives one of them away
(one in six does), and which; so the same pictures are held out wherever this runs.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ONE_IN = 6


def held_out_styles(names: list[str], styles: list[str]) -> dict[str, str]:
    """Return the style to hold out of each thing that gives one away."""
    has = defaultdict(set)
    for name, style in zip(names, styles, strict=True):
        has[name].add(style)
    all_styles, chosen = sorted(set(styles)), {}
    for name, own in has.items():
        digest = hashlib.sha256(name.encode()).digest()
        if sorted(own) == all_styles and digest[0] % ONE_IN == 0:
            chosen[name] = all_styles[digest[1] % len(all_styles)]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="+", help="Parquet files, read as one")
    parser.add_argument("output", type=Path, help="folder to write to")
    options = parser.parse_args()
    table = pa.concat_tables([pq.read_table(path) for path in options.source])
    missing = {"image", "text", "name", "style"} - set(table.column_names)
    if missing:
        raise SystemExit(
            f"{options.source[0]}: no column {', '.join(sorted(missing))}; it has {', '.join(table.column_names)}"
        )
    names, styles = table["name"].to_pylist(), table["style"].to_pylist()
    chosen = held_out_styles(names, styles)
    held = pa.array([chosen.get(name) == style for name, style in zip(names, styles, strict=True)])
    options.output.mkdir(parents=True, exist_ok=True)
    for split, mask in (("train", pc.invert(held)), ("validation", held)):
        part = table.filter(mask).replace_schema_metadata(table.schema.metadata)
        pq.write_table(part, options.output / f"{split}.parquet", row_group_size=256, compression="none")
        print(f"{options.output / split}.parquet: {len(part)} pictures")


if __name__ == "__main__":
    main()
