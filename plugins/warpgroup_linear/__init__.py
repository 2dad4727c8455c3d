"""W8A8 linears with scales by tile for GPUs whose warpgroups multiply asynchronously (sm_90)."""
