"""The edge gateway for energy sites."""

__version__ = "0.1.0"
