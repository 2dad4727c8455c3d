"""The first half hour on a GPU: one command that finds out whatever only a GPU can show. README.md tells how to use it."""
