"""Models of Triton Inference Server that make clips, as its Python backend runs them."""
