"""Times requests, sweeps settings that may change their quality, and keeps a history: `wanforge bench`."""
