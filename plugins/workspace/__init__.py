"""Where the temporary tensors of a launch plan lie in its workspace."""
