"""The two-pass step: score, coefficients, backward."""
