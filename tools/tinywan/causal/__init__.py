"""TinyWan's causal model: its walks, its lessons and its training."""
