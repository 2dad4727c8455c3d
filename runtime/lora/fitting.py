"""The LoRAs of requests on a pipeline: checked before anything is computed, and put into its weights or beside them.

What a LoRA adds to a weight that is there unquantised is merged into it. Where only the quantised weight is there, the
backend computes the product beside the linear (its side path); one that cannot gets weights that are rounded again.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import Bundle, dit_component
from wanforge.errors import RequestError
from wanforge.progress import Progress, silent
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.inputs.lora import LoraChoice, Way
from wanforge.runtime.lora.files import LoraFile, open_lora, stamp_of
from wanforge.runtime.lora.merged_sets import MergedSets
from wanforge.runtime.lora.merging import Addition, MergedWeights
from wanforge.runtime.lora.records import LoraRecord, read_records
from wanforge.runtime.lora.side_path import SidePath
from wanforge.runtime.lora.targets import Targets, targets_of

log = logging.getLogger(__name__)


Used = list[tuple[LoraChoice, LoraFile]]
"""LoRAs that are asked for, and their files as they were opened."""


@dataclass(frozen=True)
class OpenedLora:
    """A LoRA's file and what it changes in a model."""

    file: LoraFile
    records: Sequence[LoraRecord]


@dataclass(frozen=True)
class ComponentPlan:
    """What LoRAs do to a denoiser.

    Attributes:
        merged: The tensors that they change.
        side_path: What they add beside quantised linears.
    """

    merged: MergedWeights
    side_path: SidePath

    @property
    def ways(self) -> list[Way]:
        """The ways that are taken."""
        found: list[Way] = ["side path"] if self.side_path.additions else []
        if any(map(self.merged.has_exact, self.merged.additions)):
            found.append("merge")
        return [*found, "stochastic rounding"] if self.merged.is_rounded else found


class Fitting:
    """Which LoRAs a backend computes with.

    The base is the bundle's own weights, which stay as they are: merged weights take their place, and go again.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.sets = MergedSets(bundle)
        self._opened: dict[Path, OpenedLora] = {}
        self._targets: Targets | None = None
        self._clip: ClipShape | None = None
        self._used: tuple[Used, int] = [], 0
        self._planned: dict[str, tuple[Used, ComponentPlan]] = {}

    def fit(self, clip: ClipShape) -> None:
        """Choose from now on among the side paths that the backend has for clips of this size and length."""
        if clip != self._clip:
            self._clip = clip
            self._planned.clear()

    def check(self, choices: Sequence[LoraChoice]) -> None:
        """Check that all these LoRAs can be used with this model.

        Raises:
            RequestError: An expert is missing or named in vain.
            CheckpointError: A file is damaged, or does not fit the model.
            BundleError: The bundle has weights of a form to which nothing can be added.
        """
        for choice in choices:
            check_expert(choice, self.bundle.model)
            self.opened(choice.path)
        for component in self._components(choices):
            merged = self._plan(component, choices).merged
            for target in merged.additions:
                merged.base(target)

    def opened(self, path: Path) -> OpenedLora:
        """A LoRA's file with its records, read again if it has changed."""
        known = self._opened.get(path)
        if known is not None and path.is_file() and stamp_of(path) == known.file.stamp:
            return known
        self._targets = self._targets or targets_of(self.bundle.model, self.bundle.recipe)
        file = open_lora(path)
        self._opened[path] = OpenedLora(file, read_records(file, self._targets))
        return self._opened[path]

    def make_way(self, choices: Sequence[LoraChoice]) -> None:
        """Take off LoRAs of another side path than these need, so that the backend can be prepared without it."""
        if self._used[1] not in (0, self._rank(choices)):
            self.put_on(())

    def put_on(self, choices: Sequence[LoraChoice], progress: Progress = silent) -> None:
        """Let the backend compute with these LoRAs and no others, once it is prepared again. What is merged already is
        taken from the disk.

        Raises:
            ResourceError: The disk is too small for the merged weights.
            RequestError: With their strengths, values are no finite numbers.
        """
        rank = self._rank(choices)
        used = self._files(choices), rank
        if used == self._used:
            return
        plans = {each: self._plan(each, choices) for each in self._components(choices)}
        self.backend.rebind(
            {
                component: {**self._set(component, choices, progress), **plan.side_path.tensors(rank)}
                for component, plan in plans.items()
            }
        )
        self._used = used

    def described(self, choices: Sequence[LoraChoice]) -> list[dict[str, object]]:
        """What a report says of LoRAs: the files with their hashes, how strongly they act, where, and in which ways."""
        ways = {each: self._plan(each, choices).ways for each in self._components(choices)}
        return [
            {
                "file": str(choice.path),
                "sha256": self.opened(choice.path).file.sha256,
                "strength": choice.strength,
                "expert": choice.expert or None,
                "ways": ways.get(dit_component(choice.expert), []) if choice.strength else [],
            }
            for choice in choices
        ]

    def _rank(self, choices: Sequence[LoraChoice]) -> int:
        """The rank of the side path that the backend needs for these LoRAs; 0 for none."""
        ranks = [self._plan(each, choices).side_path.rank for each in self._components(choices)]
        return self.backend.side_rank(max(ranks), self._clip) if any(ranks) else 0

    def _components(self, choices: Sequence[LoraChoice]) -> list[str]:
        """The denoisers that LoRAs change."""
        found = [c.expert for c in choices if c.strength and self.opened(c.path).records]
        return [dit_component(expert) for expert in self.bundle.model.experts if expert in found]

    def _of(self, component: str, choices: Sequence[LoraChoice]) -> list[LoraChoice]:
        """The LoRAs that change a denoiser."""
        return [c for c in choices if dit_component(c.expert) == component and c.strength]

    def _files(self, choices: Sequence[LoraChoice]) -> Used:
        return [(choice, self.opened(choice.path).file) for choice in choices]

    def _plan(self, component: str, choices: Sequence[LoraChoice]) -> ComponentPlan:
        """What a denoiser becomes. The latest plan is kept, because each request asks for it several times."""
        used = self._files(self._of(component, choices))
        if component not in self._planned or self._planned[component][0] != used:
            additions: dict[str, list[Addition]] = {}
            for choice, _ in used:
                for record in self.opened(choice.path).records:
                    additions.setdefault(record.target, []).append(Addition(record, choice.strength))
            self._planned[component] = used, self._ways(component, additions)
        return self._planned[component][1]

    def _ways(self, component: str, additions: Mapping[str, Sequence[Addition]]) -> ComponentPlan:
        """What is merged, and what is added beside quantised linears because only these are there."""
        merged = MergedWeights(self.bundle, component, additions)
        beside = {
            target: products
            for target, added in additions.items()
            if not merged.has_exact(target) and (products := [each for each in added if each.record.a_RK is not None])
        }
        side_path = SidePath(beside)
        if not beside or not self.backend.side_rank(side_path.rank, self._clip):
            return ComponentPlan(merged, SidePath({}))
        rest = {
            target: left
            for target, added in additions.items()
            if (left := [each for each in added if each not in beside.get(target, ())])
        }
        return ComponentPlan(MergedWeights(self.bundle, component, rest), side_path)

    def _set(self, component: str, choices: Sequence[LoraChoice], progress: Progress) -> Mapping[str, Tensor]:
        """The tensors of a denoiser that LoRAs change, with these LoRAs."""
        merged = self._plan(component, choices).merged
        if not merged.additions:
            return {}
        files = [(file, choice.strength) for choice, file in self._files(self._of(component, choices))]
        if merged.is_rounded:
            log.warning(
                "%s has no unquantised weights, and the backend %s computes no LoRA of this kind beside the linears, "
                "so it is added to the 8-bit weights with stochastic rounding, which is less exact; import the "
                "unquantised files with --keep-unquantised",
                self.bundle.root,
                self.backend.name,
            )
        return self.sets.open(merged, files, progress)[1]


def check_expert(choice: LoraChoice, model: ModelConfig) -> None:
    """Refuse a LoRA that does not say which of two experts it is for, or says so for a model with one.

    Raises:
        RequestError: It is so.
    """
    if choice.expert in model.experts:
        return
    if choice.expert:
        raise RequestError(f"{choice}: {model.name} has no experts {choice.expert}; leave out {choice.expert}=")
    raise RequestError(
        f"{choice}: {model.name} has two experts, and a LoRA is for one of them; give it as high={choice} or "
        f"low={choice}, or once as each"
    )
