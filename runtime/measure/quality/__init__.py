"""How often a clip shows what its prompt says, read off the frames: see `meter` and `held_out`."""
