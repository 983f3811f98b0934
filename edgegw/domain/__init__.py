"""The words of the contract as immutable values."""
