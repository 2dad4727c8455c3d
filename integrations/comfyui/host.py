"""What the nodes need of ComfyUI, whichever version it is."""

import importlib.util
import io
from typing import Any, Protocol


class Host(Protocol):
    """ComfyUI, as a node that runs sees it."""

    async def show(self, percent: float, picture: Any = None) -> None:
        """Show how far the node is, with a PIL image as a preview."""

    def check(self) -> None:
        """Raise ComfyUI's exception if the user has interrupted the workflow."""

    def video(self, data: bytes) -> Any:
        """A VIDEO from the bytes of an mp4."""


class EarlierHost:
    """A ComfyUI without it."""

    LARGEST_PREVIEW = 512
    """Pixels of the longer side."""

    async def show(self, percent: float, picture: Any = None) -> None:
        from comfy.utils import ProgressBar

        preview = None if picture is None else ("JPEG", picture, self.LARGEST_PREVIEW)
        ProgressBar(100).update_absolute(percent, 100, preview)

    def check(self) -> None:
        check_interrupted()

    def video(self, data: bytes) -> Any:
        from comfy_api.input_impl import VideoFromFile

        return VideoFromFile(io.BytesIO(data))


class ModernHost(EarlierHost):
    """A ComfyUI with the V3 API."""

    async def show(self, percent: float, picture: Any = None) -> None:
        from comfy_api.v0_0_2 import ComfyAPISync

        execution = getattr(ComfyAPISync(), "execution", None)
        if execution is None:  # as in ComfyUI 0.3.64, which declares it and never sets it
            await super().show(percent, picture)
        else:
            execution.set_progress(value=percent, max_value=100, preview_image=picture)

    def video(self, data: bytes) -> Any:
        from comfy_api.v0_0_2 import InputImpl

        return InputImpl.VideoFromFile(io.BytesIO(data))


def check_interrupted() -> None:
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()


def has_v3() -> bool:
    """Whether ComfyUI has the V3 API."""
    try:
        return importlib.util.find_spec("comfy_api.v0_0_2") is not None
    except ModuleNotFoundError:  # not even what it is a part of
        return False
