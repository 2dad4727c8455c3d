"""What the machine code of compiled kernels says of their speed: instructions, loops, pipes, and an SM that issues them."""
