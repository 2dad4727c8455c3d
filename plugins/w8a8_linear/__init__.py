"""A linear layer with 8-bit weights and activations, each with one scale per 128x128 tile or per row."""
