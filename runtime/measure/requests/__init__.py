"""Times requests, sweeps over what may change their quality, and remembers: `wanforge bench`."""
