"""Bundles and the engines in them: file formats, building, inspection and loading."""
