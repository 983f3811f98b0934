"""The whole story in a minute, on simulators and a broker of its own."""
