"""Classifier-free guidance, which no model here takes."""

from wanforge.errors import RequestError


def check_guidance(scale: float | None) -> None:
    """Refuse guidance, which takes a second evaluation of the network per step. Distillation has put its effect into
    the weights, and guiding such a model once more spoils the picture.

    Raises:
        RequestError: The scale is more than 1, which is none.
    """
    if scale is not None and not scale <= 1:
        raise RequestError(
            f"guidance_scale is {scale:g}, but these models are distilled to do without guidance; leave it out, or "
            "use 1"
        )
