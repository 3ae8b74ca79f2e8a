"""Weights of a built policy: filled from Hugging Face files, gathered whole for an export."""
