"""The tensors of a model: their global names, and how they pair between Megatron and Hugging Face."""
