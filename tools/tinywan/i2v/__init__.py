"""TinyWan's image-to-video model: its shots, its lessons and its training."""
