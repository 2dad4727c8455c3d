"""Build time: checkpoint files become a bundle, the reference networks become ONNX graphs."""
