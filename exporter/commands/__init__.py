"""The commands of build time, one file each."""
