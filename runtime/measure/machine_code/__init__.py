"""What the machine code of compiled kernels says of their speed: loops, pipes, and an SM that issues instructions."""
