"""Live streams of the service: what the server and a child tell each other while a stream is watched."""
