"""What becomes of frames: an encoder writes them, beside what decodes them."""
