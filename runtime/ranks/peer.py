"""The process of a rank other than the first.

Run as ``python -m wanforge.runtime.ranks.peer PARENT``, it reads an `Opening` and then one `Task` or `Decoding` after
the other from stdin, and writes an `Answer` to each to stdout. It ends when its input does, after an error, and with
its parent, whose process id is its argument.
"""

import os
import sys
import time
from datetime import timedelta
from itertools import repeat
from pathlib import Path

import msgspec
import torch
from torch import distributed
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import WanforgeError
from wanforge.plugins.child_process import end_with
from wanforge.progress import silent
from wanforge.runtime.backends.cuda import CudaBackend
from wanforge.runtime.pipeline import Pipeline, claim
from wanforge.runtime.ranks.task import Answer, Decoding, Opening, Task, put
from wanforge.runtime.reference.ranks.exchange import ProcessGroup
from wanforge.runtime.request import Timings, latent_shape

MEETING = timedelta(minutes=10)
"""How long ranks wait for each other: to come to the meeting, and in an exchange."""


def name_of(rank: int) -> str:
    """The key by which a peer says that it comes to the meeting."""
    return f"rank {rank}"


def meet(meeting: Store, rank: int, ranks: int) -> None:
    """Make the process group of all ranks. Each of them calls this."""
    kind, store = "nccl" if torch.cuda.is_available() else "gloo", PrefixStore("group", meeting)
    distributed.init_process_group(kind, store=store, rank=rank, world_size=ranks, timeout=MEETING)


def come_to(opening: Opening) -> None:
    """Meet the other ranks as a peer."""
    meeting = FileStore(opening.meeting, opening.ranks)
    meeting.set(name_of(opening.rank), "")
    meet(meeting, opening.rank, opening.ranks)


def share(pipeline: Pipeline, work: Task | Decoding) -> None:
    """Do this rank's share of what the first rank does."""
    if isinstance(work, Task):
        pipeline.latents(pipeline.check(work.request()), Timings())
        return
    clip = ClipShape(*work.clip)
    unknown = torch.empty(latent_shape(pipeline.model, clip))[:, :, :1]
    for _ in pipeline.decode(repeat(unknown, work.latent_frames), clip, Timings()):
        pass


def pipeline_of(bundle: Bundle, budget: float | None, exchange: ProcessGroup) -> Pipeline:
    """The pipeline of one rank."""
    return Pipeline(bundle, CudaBackend(bundle, None, budget, exchange=exchange))


def main() -> None:
    end_with(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    try:
        opening = msgspec.json.decode(sys.stdin.buffer.readline(), type=Opening)
        bundle = Bundle.open(Path(opening.bundle), stale_ok=opening.stale_ok)
        pipeline = pipeline_of(bundle, opening.budget, ProcessGroup(opening.rank, opening.ranks))
        claim(bundle, pipeline.backend.files(), silent)
        put(answers, Answer())
        while line := sys.stdin.buffer.readline():
            if not distributed.is_initialized():
                come_to(opening)
            share(pipeline, msgspec.json.decode(line, type=Task | Decoding))
            put(answers, Answer())
    except Exception as error:
        said = str(error) if isinstance(error, WanforgeError) else f"{type(error).__name__}: {error}"
        put(answers, Answer(said, time.monotonic()))
        raise


if __name__ == "__main__":
    main()
