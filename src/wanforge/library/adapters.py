"""LoRAs that a pipeline computes with, loaded and chosen by name as in diffusers."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from wanforge.errors import RequestError, unknown_name
from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.pipeline import Pipeline


class Adapters:
    """The LoRAs of a pipeline.

    They are merged into the weights when a clip is made with them and go again afterwards, so all of them act with the
    weights that `set_adapters` gives them, and nothing has to be fused.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._loaded: dict[str, list[LoraChoice]] = {}
        self._weights: dict[str, float] = {}

    def load_lora_weights(
        self,
        place: str | Path,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        *,
        load_into_transformer_2: bool = False,
    ) -> None:
        """Load a LoRA, which alone is active afterwards.

        Args:
            place: Its safetensors file, or the folder that holds it.
            weight_name: The name of the file in the folder; it may be left out if there is only one.
            adapter_name: What it is called from now on; ``default_0`` and so on by default. A name that is taken gets
                this file as well, for the other expert of a model with two.
            load_into_transformer_2: Whether it is for the expert of low noise, which diffusers calls
                ``transformer_2``, of a model with two experts.

        Raises:
            RequestError: There is no such file, or the name has a LoRA for this expert already.
            CheckpointError: The file is damaged, or does not fit the model.
        """
        experts = self.pipeline.model.experts
        expert = experts[-1] if load_into_transformer_2 else experts[0]
        if load_into_transformer_2 and len(experts) == 1:
            raise RequestError(f"{self.pipeline.model.name} has one denoiser; leave out load_into_transformer_2")
        choice = LoraChoice(lora_file(Path(place), weight_name), 1.0, expert)
        name = adapter_name or self._free_name()
        before = self._loaded.get(name, [])
        if any(each.expert == expert for each in before):
            raise RequestError(f"an adapter is called {name!r} already; give another adapter_name, or delete it first")
        self.pipeline.loras.check([choice])
        self._loaded[name] = [*before, choice]
        self._weights = {name: 1.0}

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Choose the LoRAs that act, and how strongly.

        Args:
            adapter_weights: One for all, or one for each; 1 by default.

        Raises:
            RequestError: A name is not known, or there is another number of weights than of names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        one = adapter_weights is None or isinstance(adapter_weights, int | float)
        weights = [1.0 if adapter_weights is None else adapter_weights] * len(names) if one else list(adapter_weights)  # type: ignore[arg-type]
        if len(weights) != len(names):
            raise RequestError(f"there are {len(weights)} weights for {len(names)} adapters; give one for each")
        for name in names:
            self._known(name)
        self._weights = {name: float(weight) for name, weight in zip(names, weights, strict=True)}  # type: ignore[arg-type]

    def get_active_adapters(self) -> list[str]:
        """The names of the LoRAs that act."""
        return list(self._weights)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget LoRAs.

        Raises:
            RequestError: A name is not known.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._known(name)
            del self._loaded[name]
            self._weights.pop(name, None)

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs."""
        self._loaded, self._weights = {}, {}

    def active_loras(self) -> tuple[LoraChoice, ...]:
        """The LoRAs that act, as a request names them."""
        return tuple(
            LoraChoice(each.path, weight, each.expert)
            for name, weight in self._weights.items()
            for each in self._loaded[name]
        )

    def _free_name(self) -> str:
        return next(name for number in count() if (name := f"default_{number}") not in self._loaded)

    def _known(self, name: str) -> None:
        if name not in self._loaded:
            raise RequestError(unknown_name("adapter", name, list(self._loaded) or ["none"]))


def lora_file(place: Path, weight_name: str | None) -> Path:
    """The file of a LoRA.

    Raises:
        RequestError: It is not clear which of a folder's files it is, or there is none.
    """
    if not place.is_dir():
        if weight_name is not None:
            raise RequestError(
                f"{place}: is no folder here; give the folder that holds {weight_name}, or its file alone"
            )
        return place
    found = [place / weight_name] if weight_name is not None else sorted(place.glob("*.safetensors"))
    if len(found) != 1 or not found[0].is_file():
        what = f"no {weight_name}" if weight_name is not None else f"{len(found)} .safetensors files"
        raise RequestError(f"{place}: holds {what}; name one with weight_name")
    return found[0]
