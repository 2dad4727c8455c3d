"""Clips that go on from the last frame of another one."""
