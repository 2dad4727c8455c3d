"""What monitors ask: whether the service lives and works, and its figures."""
