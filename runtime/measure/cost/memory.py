"""The memory that a clip needs on a GPU, which need not be here: engines record their part, the rest is counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wanforge.configs.clip import ClipShape
from wanforge.configs.targets import Target
from wanforge.configs.topk import num_selected
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.files import engines_of
from wanforge.errors import ConfigError, ResourceError
from wanforge.plugins.denoiser_block.fused import recipe_for
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.cost.fused import fused_block
from wanforge.runtime.measure.cost.launches import USUAL_TEXT_ROWS, Workload, all_launches
from wanforge.runtime.measure.cost.prediction import predicted_seconds
from wanforge.runtime.measure.tables import indented, text_table
from wanforge.runtime.memory.plan import RESERVE, MemoryPlan, Traffic, plan_request, request_schedules, traffic
from wanforge.runtime.schedule import GraphRun

PCIE_SHARE = 0.8
"""The share of the peak rate of PCIe that copies from the host are assumed to reach."""


@dataclass(frozen=True)
class MemoryReport:
    """How one clip fits one GPU.

    Attributes:
        vram_bytes: Memory of the GPU.
        fixed_bytes: Bytes outside the arena: the reserve, and engines with everything built into them.
        plan: The memory plan; None where the clip does not fit.
        refusal: Why the clip does not fit; empty where it does.
        traffic: Traffic of weights, hidden behind computing as predicted; None where the clip does not fit.
        is_predicted: Whether a layer's time is predicted; otherwise no copy is assumed to be hidden.
    """

    target: str
    title: str
    vram_bytes: int
    clip: ClipShape
    recipe: str
    fixed_bytes: int
    plan: MemoryPlan | None
    refusal: str
    traffic: Traffic | None
    is_predicted: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values, in bytes and seconds."""
        found: dict[str, Any] = {
            "target": self.target,
            "vram_bytes": self.vram_bytes,
            "clip": str(self.clip),
            "recipe": self.recipe,
            "fixed_bytes": self.fixed_bytes,
            "refusal": self.refusal,
        }
        if self.plan is None or self.traffic is None:
            return found
        stages = {
            name: {
                "workspace_bytes": stage.workspace_bytes,
                "buffer_bytes": stage.buffer_bytes,
                "weight_bytes": self.plan.peak_bytes(name) - stage.extent,
                "peak_bytes": self.fixed_bytes + self.plan.peak_bytes(name),
            }
            for name, stage in self.plan.stages.items()
        }
        return {
            **found,
            "residency": self.plan.residency,
            "weight_bytes": self.plan.weight_bytes,
            "stages": stages,
            "pcie_bytes": self.traffic.bytes,
            "pcie_seconds": self.traffic.copy_seconds,
            "stall_seconds": self.traffic.stall_seconds,
            "is_predicted": self.is_predicted,
        }


def memory_report(bundle: Bundle, clip: ClipShape, name: str, target: Target) -> MemoryReport:
    """How a clip fits a GPU.

    Raises:
        BundleError: An engine for it is missing or stale, so nothing is known of its intermediate tensors.
    """
    model, recipe = bundle.model, bundle.recipe
    pieces = graphs(model, recipe)
    engines = {graph: bundle.manifest.files[name] for graph, name in engines_of(bundle, clip, target.sm).items()}
    fixed = RESERVE + sum(record.bytes for record in engines.values())
    vram = int(target.vram_gib * 2**30)
    workspaces = {name: record.facts["activation_bytes"] for name, record in engines.items()}
    schedules = request_schedules(model, recipe, pieces, clip)
    plan, refusal, moved = None, "", None
    layer_seconds = predicted_layer(bundle, clip, target)
    try:
        plan = plan_request(bundle, pieces, schedules, workspaces, 2, vram - fixed)
    except ResourceError as error:
        refusal = str(error)
    else:

        def predicted(graph_run: GraphRun) -> float:
            return (layer_seconds or 0.0) if graph_run.graph == "block" else 0.0

        rate = target.pcie_gbs * 1e9 * PCIE_SHARE
        moved = traffic(plan, schedules, rate, predicted)
    return MemoryReport(
        name, target.title, vram, clip, recipe.name, fixed, plan, refusal, moved, is_predicted=layer_seconds is not None
    )


def predicted_layer(bundle: Bundle, clip: ClipShape, target: Target) -> float | None:
    """Predicted seconds of a layer on a GPU, as in docs/kernels.md; None for recipes not counted there."""
    recipe = recipe_for(bundle.recipe, target.sm)
    try:
        selected = num_selected(recipe, clip, bundle.model.topk)
        workload = Workload(bundle.model, clip, recipe, selected, USUAL_TEXT_ROWS)
        return predicted_seconds(all_launches(fused_block(workload)), target)
    except ConfigError:
        return None


def table(reports: Sequence[MemoryReport]) -> str:
    """Reports as text."""
    return "\n".join(line for one in reports for line in _lines(one))


def _lines(one: MemoryReport) -> list[str]:
    clip = one.clip
    title = (
        f"{one.title} ({one.vram_bytes / 1e9:.1f} GB), {clip.width_px}x{clip.height_px}x{clip.frames}, {one.recipe}: "
    )
    if one.plan is None or one.traffic is None:
        return [title + "does not fit", f"  {one.refusal}"]
    plan, moved = one.plan, one.traffic
    rows: list[list[str]] = []
    for name, stage in plan.stages.items():
        weights, peak = plan.peak_bytes(name) - stage.extent, one.fixed_bytes + plan.peak_bytes(name)
        sizes = (stage.workspace_bytes, stage.buffer_bytes, weights, peak)
        rows.append([name, *(f"{size / 1e9:.2f}" for size in sizes)])
    header = ["GB", "intermediate", "buffers", "weights", "peak"]
    lines = [title + plan.residency, indented(text_table(header, rows))]
    lines.append(
        f"  {one.fixed_bytes / 1e9:.2f} GB of each peak are engines and a reserve; "
        f"all weights together are {plan.weight_bytes / 1e9:.2f} GB"
    )
    if moved.bytes:
        hiding = "predicted" if one.is_predicted else "assuming that nothing hides it"
        lines.append(
            f"  {moved.bytes / 1e9:.1f} GB of weights cross PCIe per request: {moved.copy_seconds:.2f} s, "
            f"{moved.stall_seconds:.2f} s of it not hidden ({hiding})"
        )
    return lines
