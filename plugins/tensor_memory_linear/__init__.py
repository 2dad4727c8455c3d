"""W8A8 linears with scales by tile for GPUs whose products go to tensor memory (sm_100)."""
