"""What changes while clients look: events as they happen, and what is expected of the queue."""
