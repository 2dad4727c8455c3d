"""The LoRAs of requests on a pipeline: checked before anything is computed, and merged into its weights when needed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import Bundle, dit_component
from wanforge.errors import RequestError
from wanforge.progress import Progress, silent
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.lora.files import LoraFile, open_lora, stamp_of
from wanforge.runtime.lora.merged_sets import MergedSets
from wanforge.runtime.lora.merging import Addition, MergedWeights
from wanforge.runtime.lora.records import LoraRecord, read_records
from wanforge.runtime.lora.targets import Targets, targets_of

log = logging.getLogger(__name__)


Used = list[tuple[LoraChoice, LoraFile]]
"""LoRAs that are asked for, and their files as they were opened."""


@dataclass(frozen=True)
class OpenedLora:
    """A LoRA's file and what it changes in a model."""

    file: LoraFile
    records: Sequence[LoraRecord]


class Fitting:
    """Which LoRAs a backend's weights contain.

    The base is the bundle's own weights, which stay as they are: merged weights take their place, and go again.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.sets = MergedSets(bundle)
        self._opened: dict[Path, OpenedLora] = {}
        self._targets: Targets | None = None
        self._used: Used = []
        self._planned: dict[str, tuple[Used, MergedWeights]] = {}

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
            merged = self._merged(component, choices)
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

    def put_on(self, choices: Sequence[LoraChoice], progress: Progress = silent) -> None:
        """Let the backend compute with these LoRAs and no others. What is merged already is taken from the disk.

        Raises:
            ResourceError: The disk is too small for the merged weights.
        """
        used = self._files(choices)
        if used != self._used:
            self.backend.rebind({each: self._set(each, choices, progress) for each in self._components(choices)})
            self._used = used

    def described(self, choices: Sequence[LoraChoice]) -> list[dict[str, object]]:
        """What a report says of LoRAs: the files with their hashes, how strongly they act, where, and how the weights
        were rounded."""
        rounded = {each for each in self._components(choices) if self._merged(each, choices).is_rounded}
        return [
            {
                "file": str(choice.path),
                "sha256": self.opened(choice.path).file.sha256,
                "strength": choice.strength,
                "expert": choice.expert or None,
                "rounding": "stochastic" if dit_component(choice.expert) in rounded else "nearest",
            }
            for choice in choices
        ]

    def _components(self, choices: Sequence[LoraChoice]) -> list[str]:
        """The denoisers that LoRAs change."""
        found = [c.expert for c in choices if c.strength and self.opened(c.path).records]
        return [dit_component(expert) for expert in self.bundle.model.experts if expert in found]

    def _of(self, component: str, choices: Sequence[LoraChoice]) -> list[LoraChoice]:
        """The LoRAs that change a denoiser."""
        return [c for c in choices if dit_component(c.expert) == component and c.strength]

    def _files(self, choices: Sequence[LoraChoice]) -> Used:
        return [(choice, self.opened(choice.path).file) for choice in choices]

    def _merged(self, component: str, choices: Sequence[LoraChoice]) -> MergedWeights:
        """What a denoiser becomes. The latest plan is kept, because each request asks for it several times."""
        used = self._files(self._of(component, choices))
        if component not in self._planned or self._planned[component][0] != used:
            additions: dict[str, list[Addition]] = {}
            for choice, _ in used:
                for record in self.opened(choice.path).records:
                    additions.setdefault(record.target, []).append(Addition(record, choice.strength))
            self._planned[component] = used, MergedWeights(self.bundle, component, additions)
        return self._planned[component][1]

    def _set(self, component: str, choices: Sequence[LoraChoice], progress: Progress) -> Mapping[str, Tensor]:
        """The tensors of a denoiser that LoRAs change, with these LoRAs."""
        files = [(file, choice.strength) for choice, file in self._files(self._of(component, choices))]
        merged = self._merged(component, choices)
        if merged.is_rounded:
            log.warning(
                "%s has no unquantised weights, so LoRAs are added to the 8-bit ones, with stochastic rounding, which "
                "is less exact; import the unquantised files with --keep-unquantised",
                self.bundle.root,
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
