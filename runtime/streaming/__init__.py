"""Videos that go on while they are watched: made, decoded and encoded at the same time, and steered on the way."""
