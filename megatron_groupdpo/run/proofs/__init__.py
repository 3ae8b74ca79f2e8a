"""What a run proves of itself, and how far numbers that should be equal may be apart."""
