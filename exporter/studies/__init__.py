"""Studies that export and build on their own: how costs grow, and what any machine can measure."""
