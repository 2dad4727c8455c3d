"""The networks in plain PyTorch: the specification that every other implementation is compared with."""
