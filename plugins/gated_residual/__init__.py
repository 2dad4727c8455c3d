"""Adding a branch back to the residual stream through a gate."""
