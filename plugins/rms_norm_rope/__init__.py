"""RMS norm of queries and keys over the full width, and their rotation by position."""
