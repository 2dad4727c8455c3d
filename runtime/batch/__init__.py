"""Offline batches: clips for a file of prompts, made by processes or by Ray, each under a name that follows from what
it shows, so that a batch that was interrupted goes on where it was."""
