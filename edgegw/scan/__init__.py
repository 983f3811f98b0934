"""Scanning: each device at its own period, whatever the others do."""
