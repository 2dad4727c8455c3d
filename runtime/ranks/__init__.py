"""One request on several GPUs, with one process for each."""
