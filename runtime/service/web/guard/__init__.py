"""What keeps clients that are slow, or send too much, from taking the server from others."""
