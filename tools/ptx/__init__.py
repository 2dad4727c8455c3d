"""A machine that executes PTX on a CPU, one thread block after another, and reports what a GPU would pass over."""
