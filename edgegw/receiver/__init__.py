"""The reference subscriber: keeps each record once and says what is missing."""
