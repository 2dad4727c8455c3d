"""LoRAs: reading every dialect of their files, merging them into a bundle's weights, and keeping what was merged."""
