"""Published checkpoint files: reading, checking, renaming, quantising, and writing files with random weights."""
