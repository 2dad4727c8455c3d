"""W8A8 linears with scales by tile for GPUs whose warps multiply on their own (`mma.sync`)."""
