"""The first half hour on a GPU: one command for whatever only a GPU can show; see README.md."""
