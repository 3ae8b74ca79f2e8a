"""Megatron-Core's GPTModel, built in one place, from parts of ours where its own cannot serve."""
