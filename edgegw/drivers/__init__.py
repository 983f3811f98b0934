"""Drivers: one folder for each field protocol, behind the port in `base`."""
