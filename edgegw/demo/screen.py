"""What the demo shows while it runs: the story's lines, and on a terminal the gateway's state below them."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edgegw.clock import mono_s
from edgegw.demo.verdict import Verdict

Status = Mapping[str, Any]
"""The gateway's /api/status."""

_STYLES = {"online": "green", "offline": "yellow", "islanded": "red", "good": "green", "bad": "red"}


class Screen:
    """Lines on any output; on a terminal a table as well, which is renewed as the gateway goes on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began_s = mono_s()
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def phase(self, title: str, about: str) -> None:
        """Begin a chapter."""
        line = Text(f"{mono_s() - self._began_s:5.1f} s  ")
        self._print(line.append(f"{title}: ", style="bold").append(about))

    def note(self, text: str) -> None:
        """Add a line to the chapter."""
        self._print(Text(f"         {text}", style="dim"))

    def show(self, status: Status | None, running: Mapping[str, bool]) -> None:
        """Renew the table; without a status the gateway is not there to be asked."""
        if self._live.is_started:
            self._live.update(_table(status, running), refresh=True)

    def verdict(self, verdict: Verdict) -> None:
        """Print the verdict."""
        table = Table(title="Verdict, counted from the receiver's database", title_justify="left")
        for column in ("", "found", ""):
            table.add_column(column)
        for finding in verdict.findings():
            mark = {True: Text("ok", "green"), False: Text("FAILED", "bold red"), None: Text("")}
            table.add_row(finding.about, finding.found, mark[finding.good])
        self._console.print(table)
        last = Text("verdict: ", "bold")
        self._print(last.append("ok", "bold green") if verdict.ok else last.append("FAILED", "bold red"))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


def _table(status: Status | None, running: Mapping[str, bool]) -> Table:
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(style="dim")
    table.add_column()
    parts = Text()
    for name, there in running.items():
        parts.append(f"● {name}   " if there else f"○ {name}   ", "green" if there else "red")
    table.add_row("processes", parts)
    if status is None:
        table.add_row("link", Text("no gateway to ask", "red"))
        return table
    journal, link = status["journal"], status["link"]["state"]
    table.add_row("link", Text(link, _STYLES.get(link, "")))
    table.add_row(
        "journal",
        f"head {journal['head']}   acknowledged {journal['acked']}"
        f"   waiting {journal['pending_records']} records in {journal['pending_batches']} batches",
    )
    devices = Text()
    for name, device in status["devices"].items():
        devices.append(f"{name} ", _STYLES.get(device["state"], "yellow")).append(
            f"{device['scans']} scans   "
        )
    table.add_row("scans", devices)
    return table
