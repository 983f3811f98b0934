"""`python -m edgegw` is the `edgegw` command."""

from edgegw.cli import main

main()
