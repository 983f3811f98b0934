"""What the gateway says of itself on the spot."""
