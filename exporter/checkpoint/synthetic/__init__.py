"""Random weights for checkpoint files."""
