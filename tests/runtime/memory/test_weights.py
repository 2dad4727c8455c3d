"""Weights are the mapped file itself: they are bound in place, without a copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import read_manifest, write_manifest
from wanforge.engines.bundle.tensorfile import read_header
from wanforge.errors import BundleError, ConfigError
from wanforge.exporter.export import export
from wanforge.runtime.backends import create_backend
from wanforge.runtime.backends import ort as ort_backend
from wanforge.runtime.backends.base import Session
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.other_recipe import read_as
from wanforge.runtime.memory.weights import Weights, map_tensors
from wanforge.runtime.pipeline import open_pipeline
from wanforge.runtime.schedule import GraphRun, text_schedule


def test_mapped_tensors_equal_the_librarys(bundle_of: Callable[[str, str], Bundle]) -> None:
    path = bundle_of("tiny-t2v", "w8a8").weights("dit")
    mapped, loaded = map_tensors(path), load_file(path)
    assert set(mapped) == set(loaded)
    for name, tensor in loaded.items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor), name


def test_mapped_tensors_share_the_files_pages(bundle_of: Callable[[str, str], Bundle]) -> None:
    path = bundle_of("tiny-t2v", "w8a8").weights("dit")
    header, mapped = read_header(path), map_tensors(path)
    starts = {tensor.data_ptr() - header.offsets[name] for name, tensor in mapped.items()}
    assert len(starts) == 1
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in lines]
    assert any(low <= starts.copy().pop() < high for low, high in spans)


def test_onnx_runtime_binds_the_mapped_weights(
    bundle_of: Callable[[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    bound: dict[str, int] = {}
    bind = ort_backend.bind

    def observed(bind_port: object, name: str, buffer: torch.Tensor) -> None:
        bound[name] = buffer.data_ptr()
        bind(bind_port, name, buffer)  # type: ignore[arg-type]

    monkeypatch.setattr(ort_backend, "bind", observed)
    backend = create_backend("ort", bundle)
    session = Session(backend, text_schedule(bundle.model, graphs(bundle.model, bundle.recipe), 5))
    session.bound("text")
    stored = backend.weights.component("text_encoder")  # type: ignore[attr-defined]
    assert bound["token_embedding.weight"] == stored["token_embedding.weight"].data_ptr()
    assert bound["attn.q.weight"] == stored["blocks.1.attn.q.weight"].data_ptr()


@pytest.mark.parametrize("recipe", ["w8a8-64", "w8a8-256"])
def test_tiles_of_other_sizes_are_for_the_reference(bundle_of: Callable[[str, str], Bundle], recipe: str) -> None:
    plain = bundle_of("tiny-t2v", "bf16-sla")
    other = read_as(plain, load_recipe(recipe))
    scale = Weights(other).of(GraphRun("block", (), (), "dit", "blocks.0."), "ffn.0.scale")
    tile = load_recipe(recipe).tile
    assert scale.shape == (plain.model.dit.ffn_dim // tile, plain.model.dit.dim // tile)
    with pytest.raises(ConfigError, match=f"graphs are made for tiles of 128, not {tile}; use the backend torch"):
        export(other)
    with pytest.raises(ConfigError, match=f"kernels are made for tiles of 128, not {tile}"):
        create_backend("cuda", other)
    with pytest.raises(BundleError, match=r"needs blocks\.0.*import the unquantised files"):
        read_as(bundle_of("tiny-t2v", "w8a8"), load_recipe(recipe))


@pytest.mark.parametrize(
    ("recipe", "parts"), [("fp8-row", ("scale", "fp8_weight")), ("nvfp4", ("global_scale", "scale", "fp4_weight"))]
)
def test_weights_in_few_bits_are_computed_as_an_import_computes_them(
    bundle_of: Callable[[str, str], Bundle], recipe: str, parts: tuple[str, ...]
) -> None:
    read = Weights(read_as(bundle_of("tiny-t2v", "bf16-sla"), load_recipe(recipe)))
    imported = Weights(bundle_of("tiny-t2v", recipe)).component("dit")
    for part in parts:
        found, expected = read.tensor("dit", f"blocks.1.ffn.2.{part}"), imported[f"blocks.1.ffn.2.{part}"]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found.float(), expected.float()), part


@pytest.mark.slow
def test_a_decoder_in_int8_is_computed_as_an_import_computes_it(bundle_of: Callable[[str, str], Bundle]) -> None:
    plain, quantised = bundle_of("tiny-t2v", "w8a8"), bundle_of("tiny-t2v", "w8a8-vae8")
    read = Weights(read_as(plain, load_recipe("w8a8-vae8")))
    imported = Weights(quantised).component("vae")
    parts = [name for name in imported if name.endswith("int8_weight")]
    assert parts
    for name in (*parts, *(part.replace("int8_weight", "scale") for part in parts)):
        assert torch.equal(read.tensor("vae", name), imported[name]), name
    with pytest.raises(BundleError, match=r"needs decoder\..*import the unquantised files"):
        read_as(quantised, load_recipe("w8a8"))


@pytest.mark.parametrize("begin", [0, 1, 2, 4, 8])
def test_a_tensor_that_kernels_could_not_read_is_copied(tmp_path: Path, begin: int) -> None:
    path = tmp_path / "odd.safetensors"
    state = {
        "a": torch.arange(8.0),
        "b": torch.arange(3.0),
        "c": torch.arange(5).to(torch.int8),
        "d": torch.tensor(2.0, dtype=torch.bfloat16),
        "e": torch.zeros(0, 4),
    }
    save_file(state, path)
    begin_at(path, begin)
    header, mapped = read_header(path), map_tensors(path)
    assert header.offsets["a"] % 16 == begin
    for name, tensor in state.items():
        assert torch.equal(mapped[name], tensor)
        assert mapped[name].data_ptr() % 16 == 0, name
    shared = mapped["a"].untyped_storage().nbytes() == path.stat().st_size
    assert shared == (begin == 0), "a tensor was copied that could be mapped, or the reverse"


def begin_at(path: Path, remainder: int) -> None:
    """Lengthen a safetensors file's header by spaces, so that its data begin at `remainder` bytes after 16 * n."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    spaces = (remainder - 8 - size) % 16
    path.write_bytes((size + spaces).to_bytes(8, "little") + data[8 : 8 + size] + b" " * spaces + data[8 + size :])


def test_components_are_mapped_once(bundle_of: Callable[[str, str], Bundle]) -> None:
    weights = Weights(bundle_of("tiny-t2v", "w8a8"))
    assert weights.component("vae") is weights.component("vae")


CHANGES = {
    "more layers": ({"num_layers": 3}, r"blocks\.2\.\S+ is missing, where tiny-t2v with recipe w8a8 has"),
    "other sizes": ({"ffn_dim": 640}, r"blocks\.0\.ffn\.\S+ is \[\d+.*\], where tiny-t2v .* has \[\d+"),
}


@pytest.mark.parametrize(("change", "complaint"), CHANGES.values(), ids=CHANGES)
def test_weights_that_do_not_fit_the_model_are_refused(
    tmp_path: Path, bundle_of: Callable[[str, str], Bundle], change: dict[str, int], complaint: str
) -> None:
    root = Path(shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle"))
    manifest = read_manifest(root)
    model = msgspec.structs.replace(manifest.model, dit=msgspec.structs.replace(manifest.model.dit, **change))
    write_manifest(root, msgspec.structs.replace(manifest, model=model))
    for use in (open_pipeline, export):
        with pytest.raises(BundleError, match=rf"dit\.safetensors: {complaint}.*wanforge import --resume"):
            use(Bundle.open(root, stale_ok=True))
