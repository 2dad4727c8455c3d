"""wanforge for programs that are written for diffusers."""
