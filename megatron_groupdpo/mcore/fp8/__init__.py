"""FP8 through Transformer Engine: what it keeps between passes, and weights that are kept in FP8."""
