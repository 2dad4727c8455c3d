"""What makes clips in a child."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from wanforge.runtime.service.child.messages import BundlePlace, ChildUsage, ClipMade, MakeClip

Report = Callable[[str, int], None]
"""Called with a stage and the percent that is done, between any two launches. It raises a `StoppedError` to stop."""


class StoppedError(Exception):
    """The clip is not wanted any more."""


class Maker(ABC):
    """Makes one clip after the other, with bundles that stay loaded."""

    @abstractmethod
    def load(self, bundles: Sequence[BundlePlace], report: Report) -> dict[str, str]:
        """Serve these bundles from now on, and load as many of them as there is memory for.

        Returns:
            Why bundles cannot be served, by fingerprint.
        """

    @abstractmethod
    def make(self, order: MakeClip, report: Report) -> ClipMade:
        """Make a clip.

        Raises:
            StoppedError: `report` has raised it.
            Exception: It cannot be made; see `failures.failure_of`.
        """

    @abstractmethod
    def loaded(self) -> tuple[str, ...]:
        """Fingerprints of the loaded bundles."""

    def warm(self) -> dict[str, str]:
        """The shape that a bundle was warmed up with when it was loaded, by fingerprint."""
        return {}

    def usage(self) -> ChildUsage:
        """What it has used, apart from the memory of the process."""
        return ChildUsage()
