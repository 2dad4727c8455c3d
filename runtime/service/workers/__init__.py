"""The supervisor of the processes that make clips."""
