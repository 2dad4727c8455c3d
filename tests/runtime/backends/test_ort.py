"""ONNX Runtime is given only graphs that take the inputs of today's, and whose data lie in the bundle."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest

from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import GraphRecord
from wanforge.engines.bundle.tensorfile import sha256_of
from wanforge.errors import BundleError
from wanforge.runtime.backends import ort
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


DECODER = "vae_decode_first.fp32.onnx"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("location", "../outside.bin"),
        ("location", "/dev/zero"),
        ("location", "weights/gone.safetensors"),
        ("offset", str(10**12)),
    ],
)
def test_a_graph_whose_data_lies_elsewhere_is_refused(
    bundle_of: Callable[[str, str], Bundle], tmp_path: Path, key: str, value: str
) -> None:
    root = Path(shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle"))
    (tmp_path / "outside.bin").write_bytes(bytes(10**7))
    model = onnx.load(root / DECODER, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = value if entry.key == key else entry.value
    (root / DECODER).write_bytes(model.SerializeToString())
    bundle = Bundle.open(root)
    record = bundle.manifest.files[DECODER]
    size, sha256 = (root / DECODER).stat().st_size, sha256_of(root / DECODER)
    bundle.add({DECODER: msgspec.structs.replace(record, bytes=size, sha256=sha256)})
    bundle.verify([DECODER], again=True)
    complaint = rf"bundle: ONNX Runtime refuses {DECODER} \(.*\); write it again with: wanforge export {root}$"
    with pytest.raises(BundleError, match=complaint) as caught:
        OrtBackend(bundle, None).graph_session("vae_decode_first")
    assert "ONNXRuntimeError" not in str(caught.value)


def test_memory_that_runs_out_is_not_blamed_on_the_graph(
    bundle_of: Callable[[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = type("RuntimeException", (Exception,), {"__module__": "onnxruntime.capi"})

    def failing(model: str | bytes) -> None:
        raise error("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer")

    monkeypatch.setattr(ort, "new_session", failing)
    with pytest.raises(error):
        OrtBackend(bundle_of("tiny-t2v", "w8a8"), None).graph_session("vae_decode_first")
