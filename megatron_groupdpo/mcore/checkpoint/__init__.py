"""Distributed checkpoints, and hashes of weights."""
