"""Finding the parts of a model in folders."""
