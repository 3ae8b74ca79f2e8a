"""Transformer Engine's layers, and FP8 through them."""
