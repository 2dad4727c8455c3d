"""Workflows of the nodes, in the form of the API."""

from typing import Any


def to_video(url: str, **inputs: Any) -> dict[str, Any]:
    """A text-to-video workflow, whose node "3" makes the clip.

    Args:
        inputs: Inputs of the nodes that load the model, choose settings and make the clip, by name.
    """
    load = {name: inputs.pop(name) for name in ("model", "recipe") if name in inputs}
    settings = {name: inputs.pop(name, 0) for name in ("width", "height", "frames", "seconds", "steps", "attention")}
    make = {"prompt": "a red circle moving right", "seed": 7, **inputs}
    return {
        "1": {"class_type": "WanforgeServerModel", "inputs": {"url": url, **load}},
        "2": {"class_type": "WanforgeSettings", "inputs": settings},
        "3": {"class_type": "WanforgeTextToVideo", "inputs": {"model": ["1", 0], "settings": ["2", 0], **make}},
    }
