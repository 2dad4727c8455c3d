"""Studies of LoRAs: what survives a merge, and what merging a large model takes."""
