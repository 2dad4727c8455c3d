"""Reads a bundle's weights by a recipe other than its own."""

import msgspec

from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import Bundle, dit_component, weights_name
from wanforge.errors import BundleError
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.graphs import graphs
from wanforge.runtime.reference.quantised_weights import unquantised_name


def read_as(bundle: Bundle, recipe: Recipe) -> Bundle:
    """The same bundle with another recipe, where its weights permit it: unquantised ones can be quantised, and the
    linear branch's learned projections can be left out. The model decides whether attention is sparse at all.

    Raises:
        BundleError: The weights are quantised differently, or lack what the recipe needs.
    """
    recipe = bundle.model.fitted(recipe)
    wanted = graphs(bundle.model, recipe)
    of_component = {dit_component(expert): ["block", "cross_kv"] for expert in bundle.model.experts}
    of_component["vae"] = [name for name in wanted if name.startswith("vae_decode")]
    for component, names in of_component.items():
        stored = bundle.header(weights_name(component)).tensors
        fit = component == "vae" or scales(bundle.recipe) == scales(recipe)
        for name in (wanted[graph].prefix + weight for graph in names for weight in wanted[graph].weights):
            plain = unquantised_name(name)
            if not (fit and name in stored) and plain not in stored:
                raise BundleError(
                    f"{bundle.root}: recipe {recipe.name!r} needs {plain}, which these weights of recipe "
                    f"{bundle.recipe.name!r} lack; import the unquantised files"
                )
    return Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, recipe=recipe), stale_ok=bundle.stale_ok)


def scales(recipe: Recipe) -> tuple[str, int]:
    """The settings that decide the shape of quantised weights' scales."""
    return recipe.linear, recipe.tile


def check_recipe(bundle: Bundle, backend: Backend, recipe: Recipe) -> None:
    """Refuse another recipe for a backend that runs exported files, which are made for the bundle's own.

    Raises:
        BundleError: The backend runs exported files, and the recipe is not the bundle's.
    """
    if recipe != bundle.recipe and any(not name.startswith("weights/") for name in backend.files()):
        raise BundleError(
            f"{bundle.root}: the backend {backend.name} runs what was exported for recipe {bundle.recipe.name!r}; "
            f"use torch or kernels for {recipe.name!r}"
        )
