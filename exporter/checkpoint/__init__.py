"""Published checkpoint files: reading, checking, renaming, quantising, and writing ones with random weights."""
