"""The two flavours of TensorRT: their libraries, and the ops as plugins."""
