"""Fetching pictures that a request names by their URLs, from public addresses of allowed hosts only."""
