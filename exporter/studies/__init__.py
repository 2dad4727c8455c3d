"""Studies that export and build on their own: how costs grow, and measurements that any machine can make."""
