"""Layer norm over the channels: plain, with weights, or modulated by a timestep."""
