"""The memory of a request: its buffers, its resident or streamed weights, and what the machine has to offer."""
