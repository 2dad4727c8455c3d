"""Servers of TinyWan."""

from tests.runtime.service.conftest import rig, tinywan

__all__ = ["rig", "tinywan"]
