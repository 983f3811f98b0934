"""The configuration: TOML in, frozen models out."""
