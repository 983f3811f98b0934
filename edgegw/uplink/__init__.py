"""The way upstream: from the journal to an MQTT broker."""
