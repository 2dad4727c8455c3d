"""A bundle's weights read by another recipe than its own."""

import msgspec

from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import Bundle, dit_component
from wanforge.engines.bundle.tensorfile import read_header
from wanforge.errors import BundleError
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.graphs import graphs


def read_as(bundle: Bundle, recipe: Recipe) -> Bundle:
    """The same weights by another recipe, where they permit it: unquantised ones can be quantised, and learned maps of
    the linear branch can be left out.

    Raises:
        BundleError: the weights are quantised otherwise, or lack what the recipe needs.
    """
    wanted = graphs(bundle.model, recipe)
    for expert in bundle.model.experts:
        stored = read_header(bundle.weights(dit_component(expert))).tensors
        for graph in (wanted["block"], wanted["cross_kv"]):
            for name in graph.weights:
                plain = graph.prefix + name.replace(".int8_weight", ".weight").replace(".scale", ".weight")
                same = scales(bundle.recipe) == scales(recipe) and graph.prefix + name in stored
                if not same and plain not in stored:
                    raise BundleError(
                        f"{bundle.root}: recipe {recipe.name!r} needs {plain}, and these weights, of recipe "
                        f"{bundle.recipe.name!r}, do not have it; import the unquantised files"
                    )
    return Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, recipe=recipe))


def scales(recipe: Recipe) -> tuple[str, int]:
    """What decides the shape of quantised weights' scales."""
    return recipe.linear, recipe.tile


def check_recipe(bundle: Bundle, backend: Backend, recipe: Recipe) -> None:
    """Refuse a backend that runs exported files, which are of the bundle's own recipe, by another.

    Raises:
        BundleError: it does.
    """
    if recipe != bundle.recipe and any(not name.startswith("weights/") for name in backend.files()):
        raise BundleError(
            f"{bundle.root}: the backend {backend.name} runs what was exported for recipe {bundle.recipe.name!r}; "
            f"use torch or kernels for {recipe.name!r}"
        )
