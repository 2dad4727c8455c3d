"""Build time: turn checkpoint files into a bundle, and the reference networks into ONNX graphs."""
