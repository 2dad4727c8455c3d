"""Predictions for kernels that others have measured, compiled here and held against what they state."""
