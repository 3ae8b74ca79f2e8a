"""Reference log-probabilities, computed once and kept on disk."""
