"""Opening a bundle on one or several GPUs."""

from collections.abc import Sequence

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError
from wanforge.progress import Progress, silent
from wanforge.runtime.backends import AUTO
from wanforge.runtime.backends.choice import resolve_backend
from wanforge.runtime.pipeline import Pipeline, claim, open_pipeline
from wanforge.runtime.reference.ranks.shares import check_heads
from wanforge.runtime.schedule import check_whole_clips


def open_on_gpus(
    gpus: int,
    bundle: Bundle,
    backend: str = AUTO,
    budget: float | None = None,
    clips: Sequence[ClipShape] = (),
    progress: Progress = silent,
) -> Pipeline:
    """Make a bundle ready to serve each request on one or several GPUs; see `pipeline.open_pipeline`.

    Args:
        gpus: The number of GPUs that share a request.
        budget: The most bytes of memory to use on each of them.

    Raises:
        ConfigError: The backend cannot share requests, or the heads cannot be divided evenly.
        ResourceError: There are too few GPUs.
    """
    if gpus == 1:
        return open_pipeline(bundle, backend, budget, clips, progress)
    name = resolve_backend(backend, bundle, clips)
    if name != "cuda":
        raise ConfigError(f"only the backend cuda shares a request among GPUs, not {name}; ask for it by its name")
    check_whole_clips(bundle.model)
    check_heads(bundle.model.dit.num_heads, gpus)
    # Imported here, because one GPU alone needs neither its kernels nor torch.distributed.
    from wanforge.runtime.ranks.divided import DividedPipeline
    from wanforge.runtime.ranks.peers import check_gpus

    check_gpus(gpus)
    pipeline = DividedPipeline(bundle, gpus, budget)
    claim(bundle, pipeline.backend.files(), progress)
    return pipeline
