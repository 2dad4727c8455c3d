"""What `wanforge build` and `wanforge generate` would do and take."""

from collections.abc import Sequence

from wanforge.configs.targets import architecture_name
from wanforge.engines.build import EngineOptions, graphs_to_build, pending_engine
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.files import is_current
from wanforge.plugins.tensorrt.library import Flavour, open_library
from wanforge.runtime.measure.durations import Work
from wanforge.runtime.measure.estimates import Estimate

ENGINE_BYTES = 8_000_000
"""More than the bytes of an engine without its constants; a block has about 2 MB, see docs/log.md, 2026-11-21."""


def estimate_build(bundle: Bundle, groups: Sequence[tuple[Flavour, EngineOptions]]) -> Estimate:
    """The estimate of a build, after the same checks as before the build itself.

    Args:
        groups: The engines that are asked for, with the flavour of TensorRT that builds them.
    """
    steps, works, disk, memory = [], [], 0, 0
    for flavour, options in groups:
        library, names = open_library(flavour), ", ".join(map(architecture_name, options.sms))
        missing = []
        for onnx, graph in graphs_to_build(bundle, options.only).items():
            pending = pending_engine(bundle, library, options, onnx, graph)
            if not is_current(bundle, pending.name, pending.key):
                missing.append(pending)
        steps.append(f"would build {len(missing)} engines for {names} with {library}:")
        steps += [f"  {pending.name}" for pending in missing]
        works += [build_work(flavour, len(missing))] if missing else []
        disk += sum(ENGINE_BYTES + pending.job.constant_bytes for pending in missing)
        memory = max([memory, *(pending.job.needed_bytes for pending in missing)])
    return Estimate(steps, works, disk, bundle.root, memory)


def build_work(flavour: Flavour, engines: int) -> Work:
    """The work of building this many engines."""
    return Work(f"build {flavour.name}", engines)
