"""Times the kernels of an op, once they are known to be correct, in turns with alternatives to them."""
