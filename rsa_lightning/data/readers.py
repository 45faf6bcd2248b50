"""Files of rows -> preference pairs: JSON lines (plain or gzip) and Parquet, with the row number in every message."""

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rsa_lightning.data.formats import FORMATS, FormatError, PreferencePair, Row, RowDefect, known

JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET = (".parquet",)


class PairFile(NamedTuple):
    """What was read from one file: the usable pairs, the number of rows, and the ids of the skipped rows by reason."""

    pairs: list[PreferencePair]
    rows: int
    skipped: dict[str, list[str]]


def read_pairs(path: str | Path, format: str = "trl", *, limit: int | None = None) -> PairFile:
    """Read the file at `path` as rows of `format`, a name in `FORMATS`; at most the first `limit` rows.

    Raises:
        FormatError: the file is missing, damaged or empty, or a row is not of this format.
    """
    if format not in FORMATS:
        raise FormatError(f"unknown format {format!r}; known: {known()}")
    path, to_pair = Path(path), FORMATS[format]
    pairs: list[PreferencePair] = []
    skipped: dict[str, list[str]] = {}
    rows = 0
    for row_number, row in islice(read_rows(path), limit):
        rows += 1
        row_id = f"{path.name}:{row_number}"
        try:
            pairs.append(dataclasses.replace(to_pair(row), row_id=row_id))
        except RowDefect as defect:
            skipped.setdefault(defect.reason, []).append(row_id)
        except FormatError as error:
            raise FormatError(f"{path}, row {row_number}: {error}") from None
    if rows == 0:
        raise FormatError(f"{path} has no rows: give a file with at least one")
    return PairFile(pairs, rows, skipped)


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (row number, row), counted from 1: the line of a JSON lines file, the row of a Parquet file."""
    check_file(path)
    if path.name.endswith(PARQUET):
        yield from parquet_rows(path)
    else:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            yield from json_rows(path, file)


def check_file(path: Path) -> None:
    """Raise FormatError unless `path` is a file we may read, with a suffix we know."""
    if path.is_dir():
        raise FormatError(f"{path} is a folder: name the file in it")
    if not path.is_file():
        raise FormatError(f"{path} does not exist: check the path (relative paths start at {Path.cwd()})")
    if not os.access(path, os.R_OK):
        raise FormatError(f"{path} may not be read by this user: change its permissions")
    if not path.name.endswith(JSON_LINES + PARQUET):
        raise FormatError(f"{path}: unknown suffix; readable are {', '.join(JSON_LINES + PARQUET)}")


def json_rows(path: Path, file: Iterable[bytes]) -> Iterator[tuple[int, Row]]:
    """The rows of an open JSON lines file. Blank lines are passed over but counted, as an editor counts them."""
    for line_number, line in lines(path, file):
        where = f"{path}, row {line_number}"
        try:
            # utf-8-sig: editors on Windows put a byte order mark first
            row = json.loads(line.decode("utf-8-sig" if line_number == 1 else "utf-8"), object_pairs_hook=unique)
        except UnicodeDecodeError as error:
            raise FormatError(f"{where}: byte {error.start} is not UTF-8: convert the file to UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where} is not valid JSON ({error}): write one object on each line") from None
        if not isinstance(row, dict):
            found = type(row).__name__
            raise FormatError(f"{where} is a JSON {found}, not an object: write one object with named columns a line")
        yield line_number, row


def unique(items: list[tuple[str, object]]) -> dict[str, object]:
    """The object of these items. Raises ValueError at a repeated name, of which `dict` would silently keep the last."""
    row = dict(items)
    if len(row) < len(items):
        raise ValueError("a name occurs twice in one object")
    return row


def lines(path: Path, file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their numbers. Read as bytes: text mode would also break lines at U+2028 inside a value."""
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line
    except EOFError:
        raise FormatError(f"{path} is cut off after row {number}: its gzip stream has no end. Copy it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise FormatError(f"{path} is damaged after row {number} ({error}): copy it again, or rename it "
                          "if it is not gzip") from None  # fmt: skip


def parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a Parquet file, batch by batch: the file is neither held in memory nor copied into a cache."""
    import pyarrow  # only this suffix needs it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            check_columns(path, file.schema_arrow.names)
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise FormatError(f"{path} cannot be read as Parquet ({reason}): copy or write it again") from None


def check_columns(path: Path, names: list[str]) -> None:
    """Raise FormatError where two columns share a name: a row would silently keep one of them."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FormatError(f"{path} has several columns named {', '.join(map(repr, twice))}: rename all but one")
