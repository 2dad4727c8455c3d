"""From latents to pictures, a latent frame at a time."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import count

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.progress import Progress, silent
from wanforge.runtime.backends.base import Backend, Session
from wanforge.runtime.causal.schedule import PREFIXES
from wanforge.runtime.graphs import Graph
from wanforge.runtime.reference.ranks.strips import Strip
from wanforge.runtime.request import Timings
from wanforge.runtime.schedule import vae_schedule


class FrameDecoder:
    """Decodes latent frames on a backend, as a part of the stream that is being made or as a stage of its own."""

    def __init__(self, backend: Backend, graphs: Mapping[str, Graph], shape: ClipShape) -> None:
        self.backend, self.graphs, self.shape = backend, graphs, shape

    def frames(self, latents: Iterable[Tensor], timings: Timings, progress: Progress = silent) -> Iterator[Tensor]:
        """Decode latent frames ``[1, C, 1, H, W]``, each when its frames are asked for: uint8 ``[H, W, 3]``. If GPUs
        share this, the latents of the first rank are decoded, and it alone gets whole frames."""
        backend, session, check = self.backend, None, None
        strip = Strip(backend.exchange, self.shape.latent_height)
        backend.join()
        for latent, (index, program, output) in zip(latents, chunks("pixels"), strict=False):
            with backend.turn(), timings.stage("decode"):
                if session is None or check is None:
                    session, check = self._session(strip.rows), backend.lease(PREFIXES["decode"])
                check()
                given = session["first_latent" if index == 0 else "latent"]
                given.copy_(strip.from_first(latent.to(given)))
                session.run(program)
                images = strip.to_first(images_of(session[output][0]), 1)
                backend.synchronise()
            with backend.turn(), timings.stage("transfer"):
                images = images.cpu()
            progress("decode", index + 1, self.shape.latent_frames)
            yield from images

    def _session(self, rows: int) -> Session:
        schedule = vae_schedule(self.graphs, self.shape, "decode", rows)
        part = self.backend.part(PREFIXES["decode"], schedule)
        if part is not None:
            return part
        self.backend.prepare(self.shape)
        return self.backend.session(schedule)


def chunks(output: str) -> Iterator[tuple[int, str, str]]:
    """Index, program and output buffer of each chunk on its way through the VAE, without end."""
    yield 0, "first", f"first_{output}"
    for index in count(1):
        yield index, f"next.{(index - 1) % 2}", output


def images_of(pixels_CTHW: Tensor) -> Tensor:
    """Pixels in [-1, 1], which may go beyond, as uint8 ``[T, H, W, C]``. Halves round up, as in upstream's writer."""
    scaled_CTHW = (pixels_CTHW.float().clamp(-1, 1) + 1) / 2 * 255
    return (scaled_CTHW + 0.5).to(torch.uint8).permute(1, 2, 3, 0).contiguous()
