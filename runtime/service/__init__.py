"""Serving videos: jobs, where they are kept, and the processes that accept and run them."""
