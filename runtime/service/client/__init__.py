"""A client of this server, and of others with the same API."""
