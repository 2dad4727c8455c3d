"""Softmax attention to all keys, and a bias of each key: attention to the text."""
