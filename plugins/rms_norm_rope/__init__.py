"""What happens to queries and keys: RMS norm over the full width, and rotation by position."""
