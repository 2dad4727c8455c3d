"""A pipeline whose denoiser and VAE are divided among several GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, distributed

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError
from wanforge.progress import Progress, silent
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.ranks.peer import pipeline_of
from wanforge.runtime.ranks.peers import Peers
from wanforge.runtime.ranks.task import Decoding, sizes_of
from wanforge.runtime.reference.ranks.exchange import ProcessGroup
from wanforge.runtime.request import CheckedRequest, Request, Timings


class DividedPipeline(Pipeline):
    """A pipeline that shares each request with other processes: all of them embed the prompt, and divide the denoiser
    and the VAE among themselves; this one gets the frames. They start with the first request, and again after an error.

    Args:
        ranks: The number of processes, this one included.
        budget: The most bytes of memory that each may use.
    """

    def __init__(self, bundle: Bundle, ranks: int, budget: float | None = None) -> None:
        single = pipeline_of(bundle, budget, ProcessGroup(0, ranks))
        super().__init__(bundle, single.backend)
        self.ranks, self.budget = ranks, budget
        self.peers: Peers | None = None
        self.is_sharing = False

    def latents(self, checked: CheckedRequest, timings: Timings, progress: Progress = silent) -> Tensor:
        """Serve a request up to its clean latents, as `Pipeline.latents` does.

        Raises:
            ResourceError: One of the other processes failed.
        """
        with self._sharing(checked.request):
            return super().latents(checked, timings, progress)

    def frames(
        self, latents: Tensor, shape: ClipShape, timings: Timings, progress: Progress = silent
    ) -> Iterator[Tensor]:
        """Decode latents, as `Pipeline.frames` does. Whoever takes no more frames ends the other processes.

        Raises:
            ResourceError: One of the other processes failed.
        """
        with self._sharing(Decoding(sizes_of(shape), latents.shape[2])):
            yield from super().frames(latents, shape, timings, progress)

    @contextmanager
    def _sharing(self, work: Request | Decoding) -> Iterator[None]:
        if self.is_sharing:
            raise ConfigError("the frames of another clip are still being made; take them all, or close their iterator")
        if self.peers is None:
            if distributed.is_initialized():
                raise ConfigError("this process has a process group of torch.distributed already; destroy it first")
            self.peers = Peers(self.bundle, self.ranks, self.budget)
        self.is_sharing = True
        try:
            with self.peers.sharing(work):
                yield
        except BaseException:
            self.peers = None  # they have ended
            raise
        finally:
            self.is_sharing = False

    def close(self) -> None:
        """End the other processes. The next request starts them again."""
        if self.peers is not None:
            self.peers.end()
        self.peers = None
