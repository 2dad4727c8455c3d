"""Compile TurboDiffusion's distilled Wan video models and run them."""

__version__ = "0.1.0"
