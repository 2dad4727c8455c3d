"""The maker of clips, which notes each run, and which dies of prompts that begin with ``poison``."""

import os
import signal
from collections.abc import Sequence

from wanforge.runtime.service.child import pipelines
from wanforge.runtime.service.child.maker import Maker, Report
from wanforge.runtime.service.child.messages import BundlePlace, ClipMade, MakeClip, SetUp

FILE = "WANFORGE_TRIAL_RUNS"
"""The variable that names the file to which runs are noted."""
POISON = "poison"


class Noted(Maker):
    """Notes the ticket of every run before it begins."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker

    def load(self, bundles: Sequence[BundlePlace], report: Report) -> dict[str, str]:
        return self.maker.load(bundles, report)

    def loaded(self) -> tuple[str, ...]:
        return self.maker.loaded()

    def make(self, order: MakeClip, report: Report) -> ClipMade:
        held = os.open(os.environ[FILE], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        os.write(held, f"{order.ticket}\n".encode())
        os.close(held)
        if str(order.request["prompt"]).startswith(POISON):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.maker.make(order, report)


def create(setup: SetUp) -> Maker:
    return Noted(pipelines.create(setup))
