"""The simulated field: a small microgrid behind real Modbus and OPC UA servers."""
