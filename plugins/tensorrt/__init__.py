"""TensorRT in its two flavours: the libraries, and the ops as plugins."""
