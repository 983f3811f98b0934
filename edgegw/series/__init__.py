"""Windows: what readings come to over stretches of time."""
