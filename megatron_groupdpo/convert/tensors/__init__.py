"""The tensors of a model on both sides: their names, how they are paired, moved and gathered."""
