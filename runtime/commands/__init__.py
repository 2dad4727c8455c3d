"""The commands of a deployed package, one file each."""
