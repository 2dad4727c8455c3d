"""What the nodes are, in both versions of ComfyUI's API, in the examples and in the registry."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.comfyui.stand_in import PACKAGE, ComfyUI, started
from wanforge.configs.sampler import MOST_STEPS
from wanforge.runtime.request import SEEDS
from wanforge.runtime.service.settings import ClientLimits

OTHERS = {
    "SaveVideo": {"video", "filename_prefix", "format", "codec"},
    "PreviewImage": {"images"},
    "LoadImage": {"image"},
}
"""The inputs of nodes of ComfyUI that the examples use."""
API = sorted((PACKAGE / "api").glob("*.json"))
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")


def definition(comfy: ComfyUI) -> Any:
    import sys

    return sys.modules[f"{comfy.package.__name__}.nodes"]


def test_both_versions_of_the_api_have_the_same_nodes() -> None:
    with started() as modern:
        schemas = {name: node.define_schema() for name, node in modern.nodes.items()}
        watched = {name for name, node in modern.nodes.items() if hasattr(node, "fingerprint_inputs")}
        assert not hasattr(modern.package, "NODE_CLASS_MAPPINGS")  # which ComfyUI would take instead
    with started(is_modern=False) as earlier:
        assert {name for name, node in earlier.nodes.items() if hasattr(node, "IS_CHANGED")} == watched
        assert earlier.nodes.keys() == schemas.keys()
        for name, node in earlier.nodes.items():
            schema = schemas[name]
            given = node.INPUT_TYPES()
            assert earlier.package.NODE_DISPLAY_NAME_MAPPINGS[name] == schema.display_name
            assert (schema.category, schema.description) == (node.CATEGORY, node.DESCRIPTION)
            assert list(node.RETURN_TYPES) == [each.kind for each in schema.outputs]
            assert list(node.RETURN_NAMES) == [each.told["display_name"] for each in schema.outputs]
            assert [*given["required"], *given.get("optional", {})] == [each.id for each in schema.inputs]
            for each in schema.inputs:
                kind, told = given["optional" if each.told["optional"] else "required"][each.id]
                assert kind == each.kind
                assert told.get("default") == each.told.get("default")


def test_every_node_and_input_says_what_it_is(comfy: ComfyUI) -> None:
    for node in definition(comfy).NODES:
        assert node.id.startswith("Wanforge")
        assert node.title.startswith("Wanforge ")
        assert node.description.endswith(".")
        for each in (*node.inputs, *node.outputs):
            assert each.tooltip.endswith("."), (node.id, each)
        for each in node.inputs:
            assert (each.kind in WIDGETS) == ("default" in each.options), (node.id, each.id)


def test_widgets_have_the_limits_of_the_server(comfy: ComfyUI) -> None:
    limits = {
        each.id: (each.options.get("min"), each.options.get("max"))
        for node in definition(comfy).NODES
        for each in node.inputs
    }
    assert limits["seed"] == (0, SEEDS - 1)
    assert limits["steps"] == (0, MOST_STEPS)
    assert limits["frames"] == (0, ClientLimits().clip_frames)
    assert limits["attention"] == (0, 1)


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_an_example_has_the_nodes_and_inputs_that_there_are(path: Path) -> None:
    with started() as comfy:
        known = {name: node.define_schema() for name, node in comfy.nodes.items()}
    for node in json.loads(path.read_text()).values():
        schema = known.get(node["class_type"])
        if schema is None:
            assert node["inputs"].keys() == OTHERS[node["class_type"]]
            continue
        required = {each.id for each in schema.inputs if not each.told["optional"]}
        assert required <= node["inputs"].keys() <= {each.id for each in schema.inputs}


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_both_forms_of_an_example_are_the_same_workflow(path: Path) -> None:
    drawn = json.loads((PACKAGE / "example_workflows" / path.name).read_text())
    assert as_api(drawn) == json.loads(path.read_text())


def as_api(drawn: dict[str, Any]) -> dict[str, Any]:
    """A workflow as the page saves it, in the form of the API."""
    sources = {link[0]: [str(link[1]), link[2]] for link in drawn["links"]}
    for number, source, slot, target, place, kind in drawn["links"]:
        nodes = {node["id"]: node for node in drawn["nodes"]}
        assert number in nodes[source]["outputs"][slot]["links"]
        assert nodes[source]["outputs"][slot]["type"] == nodes[target]["inputs"][place]["type"] == kind
    found = {}
    for node in drawn["nodes"]:
        values = [value for value in node["widgets_values"] if value not in ("fixed", "image")]
        widgets = dict(zip([each["name"] for each in node["inputs"] if "widget" in each], values, strict=True))
        wired = {each["name"]: sources[each["link"]] for each in node["inputs"] if each["link"] is not None}
        found[str(node["id"])] = {"class_type": node["type"], "inputs": widgets | wired}
    return found


def test_the_registry_finds_what_it_needs() -> None:
    told = tomllib.loads((PACKAGE / "pyproject.toml").read_text())
    project, comfy = told["project"], told["tool"]["comfy"]
    assert project["name"] == "comfyui-wanforge"
    assert project["license"] == {"file": "LICENSE"}
    assert (PACKAGE / "LICENSE").read_bytes() == (PACKAGE.parent.parent / "LICENSE").read_bytes()
    assert comfy.keys() == {"PublisherId", "DisplayName", "Icon"}
    assert (PACKAGE / comfy["Icon"]).is_file()
    assert len(project["dependencies"]) == 1
