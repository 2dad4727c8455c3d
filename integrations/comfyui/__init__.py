"""Nodes for ComfyUI that make videos with `wanforge serve`, over HTTP.

ComfyUI imports this package from its folder `custom_nodes`. If it has the V3 API, it gets the nodes from
`comfy_entrypoint`; an older one gets them as `NODE_CLASS_MAPPINGS`.
"""

from .host import has_v3

if has_v3():
    from .v3 import comfy_entrypoint

    __all__ = ["comfy_entrypoint"]
else:
    from .v1 import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
