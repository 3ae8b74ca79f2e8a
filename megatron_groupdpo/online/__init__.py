"""Sampling from the policy, verifiers and rewards."""
