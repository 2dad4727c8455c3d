"""ONNX Runtime is given only graphs that take the inputs of today's."""

from collections.abc import Callable

import msgspec
import pytest

from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import GraphRecord
from wanforge.errors import BundleError
from wanforge.runtime.backends.ort import OrtBackend

BLOCK = "onnx/fp32/block.onnx"


def without_record(record: GraphRecord) -> None:
    return None


def with_another_input(record: GraphRecord) -> GraphRecord:
    inputs = dict(record.inputs)
    return msgspec.structs.replace(record, inputs={**inputs, "slots": inputs.pop("selection")})


@pytest.mark.parametrize("change", [without_record, with_another_input])
def test_a_graph_of_another_version_is_refused(
    bundle_of: Callable[[str, str], Bundle], change: Callable[[GraphRecord], GraphRecord | None]
) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    assert BLOCK in OrtBackend(bundle, None).files()
    file = bundle.manifest.files[BLOCK]
    assert file.graph is not None
    files = {**bundle.manifest.files, BLOCK: msgspec.structs.replace(file, graph=change(file.graph))}
    old = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, files=files))
    with pytest.raises(BundleError, match=f"{BLOCK} was exported by another version .* run: wanforge export"):
        OrtBackend(old, None).files()
