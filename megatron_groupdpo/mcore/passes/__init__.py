"""What runs on a built model: the two passes, their log-probabilities, the update, sampling."""
