"""Megatron-Core's GPTModel of local layers: built in one place, from parts of ours where its own cannot serve."""
