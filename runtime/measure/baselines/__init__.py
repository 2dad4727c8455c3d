"""Baselines to time backends against: other ways to run the same networks, not meant for deployment."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wanforge.engines.bundle.bundle import Bundle
    from wanforge.runtime.backends.base import Backend

BASELINES = ("compile", "diffusers")


def create_baseline(name: str, bundle: "Bundle") -> "Backend":
    """Create a baseline for a bundle.

    Raises:
        ResourceError: This machine has too little memory for it.
    """
    if name == "compile":
        from wanforge.runtime.measure.baselines.compiled import CompiledBackend

        return CompiledBackend(bundle, None)
    from wanforge.runtime.measure.baselines.diffusers import DiffusersBackend

    return DiffusersBackend(bundle, None)


def missing_baselines(names: Iterable[str]) -> dict[str, str]:
    """The baselines among `names` that cannot run here, each with the reason."""
    from wanforge.runtime.measure.baselines import compiled, diffusers

    modules = {"compile": compiled, "diffusers": diffusers}
    found = {name: modules[name].missing() for name in names}
    return {name: reason for name, reason in found.items() if reason}
