"""Fetching the files of published models from the Hugging Face Hub."""
