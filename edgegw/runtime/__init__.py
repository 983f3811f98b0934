"""Services and their supervision; it knows nothing of gateways."""
