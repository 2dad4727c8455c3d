"""How long each launch of a block is predicted to take on a GPU, from the machine code of compiled kernels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.configs.targets import Target
from wanforge.configs.topk import num_selected
from wanforge.plugins.denoiser_block.fused import recipe_for
from wanforge.plugins.launching.cubins import Cubin, CubinStore
from wanforge.plugins.launching.launch import Launch
from wanforge.runtime.backends.block_launches import launches
from wanforge.runtime.measure.cost.fused import fused_block
from wanforge.runtime.measure.cost.launches import (
    USUAL_TEXT_ROWS,
    LaunchCost,
    Workload,
    all_launches,
)
from wanforge.runtime.measure.cost.prediction import Prediction, known_profile, predicted, prediction_of, usage_of
from wanforge.runtime.measure.machine_code.profiles import Profile, Usage, profiles
from wanforge.runtime.measure.machine_code.rates import gpu_of
from wanforge.runtime.measure.tables import number, text_table


@dataclass(frozen=True)
class LaunchTime:
    """One launch of a model's block on a GPU; kernels of libraries have no profile."""

    model: str
    target: Target
    cost: LaunchCost
    prediction: Prediction
    profile: Profile | None

    @property
    def share(self) -> float:
        """The share of the roofline's speed that is predicted."""
        return self.cost.roofline(self.target) / self.prediction.seconds

    def as_json(self) -> dict[str, Any]:
        """Plain values, in seconds."""
        return {
            "model": self.model,
            "target": gpu_of(self.target),
            "launch": self.cost.name,
            "roofline_seconds": self.cost.roofline(self.target),
            "predicted_seconds": self.prediction.seconds,
            "share_of_roofline": self.share,
            "bound": self.prediction.bound,
            "sm_seconds": self.prediction.sm_seconds,
            "dram_seconds": self.prediction.dram_seconds,
            "l2_seconds": self.prediction.L2_seconds,
            "tail": self.prediction.tail,
            "programs_per_sm": self.profile.programs if self.profile else None,
            "parts": msgspec.to_builtins(self.profile.parts) if self.profile else [],
        }


class BlockTimes:
    """Predicts the launches of models from the kernels in a folder.

    Args:
        cubins: The compiled kernels of the launches that are asked for.
    """

    def __init__(self, folder: Path, cubins: Iterable[Cubin]) -> None:
        self.store, self.cubins = CubinStore(folder), {cubin.key: cubin for cubin in cubins}
        self._profiles: dict[tuple[str, str], Profile] = {}

    def of_block(self, model: ModelConfig, recipe: Recipe, shape: ClipShape, target: Target) -> list[LaunchTime]:
        """Every launch of one block of a model on a GPU.

        Raises:
            ConfigError: Launches of the recipe are not counted.
            ResourceError: A kernel is not one of the package's profiles, and the disassembler is missing.
        """
        runs = model.fitted(recipe_for(recipe, target.sm))
        selected = num_selected(runs, shape, model.topk)
        costs = all_launches(fused_block(Workload(model, shape, runs, selected, USUAL_TEXT_ROWS)))
        recorded = iter(launches(model, recipe, target.sm, shape))
        return [self._timed(model, cost, next(recorded) if cost.run else None, target) for cost in costs]

    def _timed(self, model: ModelConfig, cost: LaunchCost, launch: Launch | None, target: Target) -> LaunchTime:
        if launch is None or cost.run is None:
            return LaunchTime(model.name, target, cost, predicted([cost], target)[0], None)
        profile = self._profile(launch, gpu_of(target), usage_of(cost, cost.run, launch.kernel.name, target.sm))
        return LaunchTime(model.name, target, cost, prediction_of(cost, cost.run, profile, target), profile)

    def _profile(self, launch: Launch, gpu: str, usage: Usage) -> Profile:
        cubin = self.cubins[launch.specialisation.key]
        key = cubin.sha256, gpu
        if key not in self._profiles:
            known = known_profile(*key)
            self._profiles[key] = known or profiles(cubin, self.store.read(cubin), [gpu], usage)[gpu]
        return self._profiles[key]


def block_times(
    models: Iterable[tuple[ModelConfig, ClipShape]],
    recipe: Recipe,
    gpus: Iterable[Target],
    folder: Path,
    cubins: Iterable[Cubin],
) -> list[LaunchTime]:
    """Every launch of one block of some models, each with its clip, on some GPUs; see `BlockTimes`."""
    found, targets = BlockTimes(folder, cubins), list(gpus)
    return [time for model, shape in models for gpu in targets for time in found.of_block(model, recipe, shape, gpu)]


def times_table(times: Sequence[LaunchTime]) -> str:
    """Launches in order, by model and GPU, in microseconds."""
    lines: list[str] = []
    for title in dict.fromkeys((each.model, each.target.title) for each in times):
        block = [each for each in times if (each.model, each.target.title) == title]
        rows = [
            [each.cost.name, *_micro(each.cost.roofline(each.target), each.prediction.seconds), each.prediction.bound]
            for each in block
        ]
        total = sum(each.cost.roofline(each.target) for each in block), sum(each.prediction.seconds for each in block)
        rows.append(["block", *_micro(*total), ""])
        lines += [f"{title[0]} on a {title[1]}, predicted:", text_table(HEAD, rows)]
    return "\n".join(lines)


HEAD = ("", "roofline, µs", "predicted, µs", "of roofline", "bound by")


def _micro(roofline: float, predicted: float) -> tuple[str, str, str]:
    return number(1e6 * roofline), number(1e6 * predicted), f"{roofline / predicted:.0%}"
