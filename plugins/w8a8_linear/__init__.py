"""Linear layer with 8-bit weights and activations, one scale per 128x128 tile or per row of each."""
