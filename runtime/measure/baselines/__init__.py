"""What a backend is timed against: other ways to run the same networks, none of them a way to deploy."""
