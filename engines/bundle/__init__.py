"""A bundle on disk: its manifest, its tensor files, and the element types they hold."""
