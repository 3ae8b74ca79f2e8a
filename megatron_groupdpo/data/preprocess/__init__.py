"""Records to a token store: partition, tokenize, write, resume."""
