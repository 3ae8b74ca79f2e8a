"""Everything that touches Megatron-Core; the only folder that imports megatron."""
