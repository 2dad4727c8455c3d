"""Train TinyWan, the small model in the package; see README.md."""
