"""Pure functions from scores to group losses, one per objective."""
