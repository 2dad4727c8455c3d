"""Times the kernels of one op, once they are known to be right, in turns with what else could do its work."""
