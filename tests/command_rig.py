"""Commands run in the test's own process, and journals made for them in no time."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from edgegw.cli import main
from edgegw.domain.batch import GENESIS, Batch, Kind, decode
from edgegw.domain.era import Era
from edgegw.domain.record import Record
from edgegw.journal.encode import Sealer, group
from edgegw.journal.spanner import Spanner
from edgegw.journal.store import Row, Span, Store
from edgegw.journal.thin import Source, thin

Run = Callable[..., tuple[int, str, str]]
ERA = Era(True, "boot", 0, 0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; return exit code, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgegw", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def journal(
    path: Path, groups: Iterable[list[Record]], *, thinned: range = range(0)
) -> list[tuple[Batch, bytes]]:
    """Write a journal of one batch or two for each of `groups`, the data of `thinned` as summaries of minutes."""
    store = Store(path, 1 << 30).open(0, check=False)
    sealer = Sealer("site-7", store.stream, 0, GENESIS)
    spanner, made, rows, spans = Spanner(), [], [], []
    runs: list[list[Source]] = [[]]
    for number, records in enumerate(groups):
        for one in group(records, ERA, 128 * 1024):
            batch, body = sealer.seal(one)
            if number in thinned and batch.kind is Kind.DATA:
                if runs[-1] and runs[-1][-1].last + 1 != batch.seq:
                    runs.append([])
                runs[-1].append(Source(batch.seq, batch.last, batch.digest, decode(body)))
                continue
            made.append((batch, body))
            times = [record.ts for record in records]
            rows.append(_row(batch, max(times)))
            spanner.add(Span(batch.seq, batch.last, min(times), max(times)), len(batch.packed))
            spans += spanner.take()
    summaries = thin(runs, 60, 100_000) if runs[0] else []
    rows += [_row(sealer.summary(short, 60), short.last_ts, short.last_prev, 60) for short in summaries]
    store.append(sorted(rows), spans=spans)
    store.close()
    return made


def _row(batch: Batch, ts: int, link: bytes | None = None, period: int = 0) -> Row:
    kind = batch.kind.value
    return Row(batch.seq, batch.count, kind, period, ts, 0, batch.digest, link, batch.size, batch.packed)
