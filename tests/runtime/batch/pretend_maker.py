"""Makes a file of a few bytes, in which it notes who may look into the folder where it was made."""

from collections.abc import Sequence
from pathlib import Path

from wanforge.runtime.service.child.maker import Maker, Report
from wanforge.runtime.service.child.messages import BundlePlace, ClipMade, MakeClip, SetUp


class PretendMaker(Maker):
    def load(self, bundles: Sequence[BundlePlace], report: Report) -> dict[str, str]:
        return {}

    def loaded(self) -> tuple[str, ...]:
        return ()

    def make(self, order: MakeClip, report: Report) -> ClipMade:
        folder = Path(order.folder)
        outer = folder.parent.parent.parent  # that of the cache in which the staging is
        (folder / "video.mp4").write_text(f"{outer.stat().st_mode & 0o777:o}")
        return ClipMade(order.ticket, {"video": "video.mp4"}, "pretend", {}, {"bytes": 3})


def create(setup: SetUp) -> Maker:
    return PretendMaker()
