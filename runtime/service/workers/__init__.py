"""The processes that make clips: a supervisor, and a child for each GPU. Only the children load PyTorch."""
