"""The ops: one folder each, with the definition in plain PyTorch and its implementations."""
