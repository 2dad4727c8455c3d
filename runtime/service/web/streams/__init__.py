"""Live streams over HTTP: one request starts a stream and receives it, and others steer it."""
