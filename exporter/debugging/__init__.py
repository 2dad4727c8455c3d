"""Scripts for Polygraphy; see docs/debugging.md."""
