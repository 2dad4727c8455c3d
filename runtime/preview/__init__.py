"""What the preview decoder shows of a clip while it is being made."""
