"""How fast a causal model would stream on a GPU that need not be here, and what memory it would take. All of it is
predicted from counted operations and bytes; nothing is run."""
