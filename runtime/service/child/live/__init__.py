"""Live streams in a child: made, encoded, kept in a file, and handed to the server while they are watched."""
