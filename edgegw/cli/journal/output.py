"""Rows to the terminal or to a file: as lines, CSV, NDJSON or SQLite; never more than a few are held."""

import csv
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import click
import msgspec
import sqlite_utils

Row = tuple[Any, ...]
"""The cells of a row; the first is its time, in milliseconds."""
Columns = Mapping[str, type]
"""The names and types of the cells; `bytes` stands for whatever a reading may hold."""

CHUNK = 10_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def when(ts: int) -> str:
    """Return a time in ISO 8601, UTC, to the millisecond; one that no calendar has as it is."""
    try:
        return (_EPOCH + timedelta(milliseconds=ts)).isoformat(timespec="milliseconds")[:-6] + "Z"
    except OverflowError:
        return str(ts)


def as_text(value: Any) -> str:
    """Return a cell as text: what JSON has no quotes around as in JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def write_lines(out: TextIO, heads: Mapping[str, int], rows: Iterable[Sequence[str]]) -> None:
    """Write lines for people; `heads` has the width of each column, less than 0 to stand at its right."""
    form = "  ".join(f"{{:{'>' if width < 0 else '<'}{abs(width)}}}" for width in heads.values())
    click.echo(form.format(*heads).rstrip(), file=out)
    for row in rows:
        click.echo(form.format(*row).rstrip(), file=out)


def write_csv(out: TextIO, columns: Columns, rows: Iterable[Row]) -> None:
    """Write CSV, its times in ISO 8601."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows((when(row[0]), *map(as_text, row[1:])) for row in rows)


def write_ndjson(out: TextIO, columns: Columns, rows: Iterable[Row]) -> None:
    """Write an object a line, its time in milliseconds; but for `value`, what there is not is left out."""
    for row in rows:
        cells = zip(columns, row, strict=True)
        made = {name: cell for name, cell in cells if cell is not None or name == "value"}
        out.write(msgspec.json.encode(made).decode() + "\n")


def write_sqlite(file: Path, name: str, columns: Columns, rows: Iterable[Row]) -> None:
    """Write a table of a new SQLite file, its times in milliseconds."""
    with closing(sqlite3.connect(file)) as connection:
        table = sqlite_utils.Database(connection).table(name)
        table.create(dict(columns))
        insert = f"INSERT INTO {name} VALUES ({', '.join('?' * len(columns))})"
        for some in chunks(rows):
            connection.executemany(insert, [[_stored(cell) for cell in row] for row in some])
        table.create_index(["ts"])
        connection.commit()


def _stored(value: Any) -> Any:
    if isinstance(value, list | dict):
        return msgspec.json.encode(value).decode()
    return float(value) if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63 else value


def chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield rows some at a time."""
    remaining = iter(rows)
    while some := list(islice(remaining, CHUNK)):
        yield some
