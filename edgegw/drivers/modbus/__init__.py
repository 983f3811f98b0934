"""Modbus over TCP, TLS, RTU over TCP and serial lines."""
