"""Names of the pictures that show what a running job has got to.

They follow from the job, so nothing has to be recorded of pictures that last for seconds. They are deleted when the
attempt ends, and as orphans if that fails.
"""

import hashlib

from wanforge.runtime.service.job import Job, State

STILL = "preview.webp"
"""The file in which a child draws such a picture; each step replaces it."""
PREVIEW, STEP = "preview ", "step "
"""The beginnings of the stages that are numbered."""
BEFORE = ("text", "condition", "prepare", "load")
"""The stages before the first step."""


def preview_name(job: Job, step: int) -> str:
    """The name of the object that shows what a step of the current attempt predicts; steps count from 1."""
    return f"{hashlib.sha256(f'{job.id}/{job.attempt}/{step}'.encode()).hexdigest()[:32]}.webp"


def previewed_step(job: Job) -> int:
    """The latest step of which there can be a picture, by the stage of the job; 0 if there is none yet."""
    stage = job.stage
    if job.state is not State.IN_PROGRESS or stage is None or stage in BEFORE:
        return 0
    if stage.startswith(PREVIEW):
        return int(stage.removeprefix(PREVIEW))
    if stage.startswith(STEP):
        return int(stage.removeprefix(STEP)) - 1
    return job.steps
