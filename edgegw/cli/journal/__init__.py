"""`edgegw journal`: one module for each kind of thing that is done with it."""

import click

from edgegw.cli.journal.carry import export, import_file
from edgegw.cli.journal.look import stat, tail, verify
from edgegw.cli.journal.query import query
from edgegw.cli.journal.tend import ack, prune


@click.group("journal")
def command() -> None:
    """Figures, records and integrity of the journal, and what is carried by hand; the gateway may run meanwhile."""


for _part in (stat, tail, query, verify, export, import_file, ack, prune):
    command.add_command(_part)
