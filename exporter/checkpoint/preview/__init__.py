"""The files of preview decoders."""
