"""Tables of captions that lie beside pictures: JSON Lines, CSV or Parquet, all values as they were written."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..errors import LatentDiffError, one_line, reraise_as
from .texts import SURROGATES, encoding_of, json_as_written

MAX_FIELD = 1 << 24  # characters of a CSV value
Row = dict[str, Any]  # a value is a text, None or a list of them


def columns_and_names(path: Path) -> tuple[list[str], list[str]]:
    """Return the columns of a JSON Lines, CSV or Parquet table and its `file_name`s; raises as `table_rows` does."""
    columns, chosen = dict[str, None](), None
    if path.suffix.lower() == ".parquet":
        with reraise_as(LatentDiffError, f"{path}: not a valid Parquet file", OSError, ValueError):
            columns = dict.fromkeys(pq.read_schema(path).names)
        chosen = [name for name in columns if name == "file_name"]
    names = []
    for row in table_rows(path, chosen):
        columns |= dict.fromkeys(row)
        names.append(str(row.get("file_name") or ""))
    if not names:
        raise LatentDiffError(f"{path}: has no rows")
    return list(columns), names


def table_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a JSON Lines, CSV or Parquet table by column, all values as texts as they were written.

    Of a Parquet table only `columns` are read.

    Raises LatentDiffError, which names the file and the line, for whatever is not such a table.
    """
    other = f"{path}: neither UTF-8 nor marked as UTF-16 or UTF-32; save it as UTF-8"
    with (
        reraise_as(LatentDiffError, f"{path}: cannot be read", OSError, csv.Error, ValueError),
        reraise_as(LatentDiffError, other, UnicodeError),
    ):
        if path.suffix.lower() == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(columns=columns):
                yield from ({key: _text(value, path, 0) for key, value in row.items()} for row in batch.to_pylist())
            return
        with path.open("rb") as file:
            encoding = encoding_of(file.read(4))
        with path.open(encoding=encoding, newline="" if path.suffix.lower() == ".csv" else None) as file:
            yield from _csv_rows(path, file) if path.suffix.lower() == ".csv" else _json_rows(path, file)


def _csv_rows(path: Path, file: Any) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(file, strict=True)
    columns = next(reader, [])
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        _refuse(path, 1, f"the column {twice[0]!r} is there twice; rename one, and name both in data.caption_columns")
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            _refuse(path, reader.line_num, f"not valid CSV ({error})")
        if values is None:
            return
        if len(values) > len(columns):
            _refuse(path, reader.line_num, f"{len(values)} values for {len(columns)} columns; "
                                           "a caption with a comma in it needs quotes around it")  # fmt: skip
        if values:
            texts = (_text(value, path, reader.line_num) for value in values)
            yield dict(zip(columns, texts, strict=False))  # a row that is cut short has no caption


def _json_rows(path: Path, file: Any) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json_as_written(line)
        except (ValueError, RecursionError) as error:
            _refuse(path, number, f"not valid JSON ({error})")
        if not isinstance(row, dict):
            _refuse(
                path, number, f'expected an object such as {{"file_name": ..., "text": ...}}, not {one_line(line)[:60]}'
            )
        yield {key: _text(value, path, number) for key, value in row.items()}


def _text(value: Any, path: Path, number: int) -> Any:
    """Return a value as text, a list of them, or None; anything else, such as a table, as it is."""
    if isinstance(value, list):
        return [_text(inner, path, number) for inner in value]
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, str) and ("\0" in value or SURROGATES.search(value)):
        _refuse(path, number, f"{ascii(value)[:60]} is not valid text")
    if value is None or isinstance(value, str | dict):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refuse(path: Path, number: int, why: str) -> NoReturn:
    raise LatentDiffError(f"{path} line {number}: {why}")
