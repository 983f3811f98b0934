"""Rows to a Parquet file (extra `parquet`)."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edgegw.cli.journal.output import Columns, Row, as_text, chunks
from edgegw.errors import ConfigError

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError as error:
    raise ConfigError(
        ["--format parquet needs pyarrow, which is not installed; pip install 'edgegw[parquet]'"]
    ) from error


def write_parquet(file: Path, columns: Columns, rows: Iterable[Row]) -> None:
    """Write a Parquet file; a text, or an array as JSON, stands in `value_text`, a number in `value`."""
    makers = [maker for at, (name, kind) in enumerate(columns.items()) for maker in _makers(at, name, kind)]
    schema = pa.schema([(name, kind) for name, kind, _ in makers])
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for some in chunks(rows):
            arrays = [pa.array([make(row) for row in some], kind) for _, kind, make in makers]
            writer.write_table(pa.table(arrays, schema=schema))


def _makers(at: int, name: str, kind: type) -> list[tuple[str, Any, Callable[[Row], Any]]]:
    """Return the columns of the file that a column of the rows becomes."""
    if name == "ts":
        return [(name, pa.timestamp("ms", "UTC"), lambda row: row[at])]
    if kind is bytes:
        number = (name, pa.float64(), lambda row: _number(row[at]))
        return (
            [number, ("value_text", pa.string(), lambda row: _text(row[at]))] if name == "value" else [number]
        )
    if kind is int:
        return [(name, pa.int64(), lambda row: row[at])]
    return [(name, pa.string(), lambda row: None if row[at] is None else as_text(row[at]))]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, bool | int | float) else None


def _text(value: Any) -> str | None:
    return as_text(value) if isinstance(value, str | list) else None
