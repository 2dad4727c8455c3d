"""The commands that run a server, and that talk to one."""
