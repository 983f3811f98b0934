"""The journal: every record, in order, on disk before anyone else hears of it."""
