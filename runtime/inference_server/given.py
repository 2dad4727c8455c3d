"""A pipeline some of whose stages were computed in other processes."""

from torch import Tensor

from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import RequestError
from wanforge.progress import Progress, silent
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.reference.text_encoder import pad_rows
from wanforge.runtime.request import CheckedRequest, Request, Timings, latent_shape


class GivenPipeline(Pipeline):
    """Leaves out the stages whose results are given.

    Attributes:
        embedding: The rows of the prompt's tokens, float32 ``[N, E]``, which holds every 16-bit type exactly.
        channels: What an image-to-video denoiser is conditioned on, float32 ``[1, 20, F, H, W]``.
        clean: The clean latents, float64 ``[1, C, F, H, W]``.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        super().__init__(bundle, backend)
        self.embedding: Tensor | None = None
        self.channels: Tensor | None = None
        self.clean: Tensor | None = None

    def text(self, ids: list[int], timings: Timings, progress: Progress = silent) -> Tensor:
        """The embedding of a prompt, as `Pipeline.text` returns it.

        Raises:
            RequestError: The one that is given has another size.
        """
        if self.embedding is None:
            return super().text(ids, timings, progress)
        check_shape("EMBEDDING", self.embedding, (len(ids), self.model.dit.text_dim))
        return pad_rows(self.embedding.to(self.backend.dtype), self.model.dit.text_rows)[None]

    def encode_images(self, request: Request, progress: Progress = silent) -> Tensor:
        """The condition of a picture, as `Pipeline.encode_images` returns it.

        Raises:
            RequestError: The one that is given has another size.
        """
        if self.channels is None:
            return super().encode_images(request, progress)
        channels = self.model.dit.in_channels - self.model.dit.out_channels
        check_shape("CONDITION", self.channels, (1, channels, *latent_shape(self.model, request.shape)[2:]))
        return self.channels.to(self.backend.dtype)

    def latents(self, checked: CheckedRequest, timings: Timings, progress: Progress = silent) -> Tensor:
        """The clean latents, as `Pipeline.latents` returns them.

        Raises:
            RequestError: Those that are given have another size.
        """
        if self.clean is None:
            return super().latents(checked, timings, progress)
        check_shape("LATENTS", self.clean, latent_shape(self.model, checked.request.shape))
        return self.clean


def check_shape(name: str, found: Tensor, wanted: tuple[int, ...]) -> None:
    """Refuse what was computed for another request.

    Raises:
        RequestError: It has another shape.
    """
    if tuple(found.shape) != wanted:
        raise RequestError(f"{name} is {list(found.shape)}, and this request needs {list(wanted)}")
