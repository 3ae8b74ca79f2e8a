"""Hugging Face's side: the model, its files, its tokenizer, the hub."""
