"""Every dialect gives the same records, and what does not fit is refused by name."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from tests.runtime.lora.lora_files import ALPHA, DIALECTS, RANK, factors, spelled, targets, write
from wanforge.errors import CheckpointError
from wanforge.runtime.lora.files import open_lora
from wanforge.runtime.lora.records import LoraRecord, read_records
from wanforge.runtime.lora.scales import METADATA
from wanforge.runtime.lora.targets import Targets


@pytest.fixture(scope="module")
def tiny() -> Targets:
    return targets()


def read(path: Path, tiny: Targets) -> list[LoraRecord]:
    return read_records(open_lora(path), tiny)


def values(records: list[LoraRecord]) -> list[tuple[object, ...]]:
    """Records without the places where their tensors lie."""
    return [
        (r.target, r.kind, r.scale, None if r.a_RK is None else r.a_RK.rows().tolist(), r.b_NR.rows().tolist())
        for r in records
    ]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_records(dialect: str, tiny: Targets, tmp_path: Path) -> None:
    parts = factors(tiny)
    found = read(write(tmp_path / "a.safetensors", spelled(dialect, parts)), tiny)
    expected = [
        (f"{name}.weight", "lowrank", ALPHA / RANK, a_RK.tolist(), b_NR.tolist())
        for name, (a_RK, b_NR) in sorted(parts.items())
    ]
    assert values(found) == sorted(expected)


def test_without_alpha_the_scale_is_one(tiny: Targets, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", spelled("original", factors(tiny), alpha=None))
    assert {record.scale for record in read(path, tiny)} == {1.0}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8, "r": RANK}, 8 / RANK),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / RANK**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"ffn.net.2": 2}}, 8 / RANK),
    ],
)
def test_alpha_comes_from_metadata_or_from_the_file_beside(
    config: dict[str, object], scale: float, tiny: Targets, tmp_path: Path
) -> None:
    tensors = spelled("diffusers", factors(tiny), alpha=None)
    told = {METADATA: json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    inside = read(write(tmp_path / "a.safetensors", tensors, told), tiny)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    beside = read(write(tmp_path / "adapter_model.safetensors", tensors), tiny)
    for record in [*inside, *beside]:
        is_named = "alpha_pattern" in config and record.target.endswith("ffn.2.weight")
        assert record.scale == (2 / RANK if is_named else scale)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"lora_alpha": "8"}',
        '{"use_dora": true}',
        '{"alpha_pattern": {".*": 1}}',
        f'{{"lora_alpha": {"9" * 400}}}',
    ],
)
def test_metadata_that_cannot_be_followed_is_refused(text: str, tiny: Targets, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", spelled("diffusers", factors(tiny), alpha=None), {METADATA: text})
    with pytest.raises(CheckpointError, match=METADATA):
        read(path, tiny)


def test_whole_differences_are_records_of_their_kinds(tiny: Targets, tmp_path: Path) -> None:
    dim = 256
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.diff": torch.ones(dim, dim),
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(dim),
        "diffusion_model.blocks.1.diff_m": torch.ones(1, 6, dim),
        "diffusion_model.blocks.0.norm3.diff": torch.ones(dim),
        "diffusion_model.blocks.0.norm3.diff_b": torch.ones(dim),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.ones(dim),
        "diffusion_model.head.diff_m": torch.ones(2, dim),
        "diffusion_model.patch_embedding.diff": torch.ones(dim, 16, 1, 2, 2),
    }
    found = {record.target: record.kind for record in read(write(tmp_path / "a.safetensors", tensors), tiny)}
    assert found == {
        "blocks.0.self_attn.q.weight": "weight",
        "blocks.0.self_attn.q.bias": "bias",
        "blocks.1.modulation": "modulation",
        "blocks.0.norm3.weight": "norm",
        "blocks.0.norm3.bias": "bias",
        "blocks.0.self_attn.norm_q.weight": "norm",
        "head.modulation": "modulation",
        "patch_embedding.weight": "weight",
    }


@pytest.mark.parametrize(
    ("spelling", "target"),
    [
        ("blocks.0.norm2.diff", "blocks.0.norm3.weight"),
        ("blocks.0.attn1.to_out.0.diff_b", "blocks.0.self_attn.o.bias"),
        ("blocks.0.ffn.net.0.proj.diff_b", "blocks.0.ffn.0.bias"),
        ("condition_embedder.time_proj.diff_b", "time_projection.1.bias"),
        ("condition_embedder.text_embedder.linear_2.diff_b", "text_embedding.2.bias"),
        ("proj_out.diff_b", "head.head.bias"),
        ("blocks.1.scale_shift_table.diff", "blocks.1.modulation"),
        ("scale_shift_table.diff", "head.modulation"),
    ],
)
def test_names_of_diffusers_mean_the_right_tensors(spelling: str, target: str, tiny: Targets, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"transformer.{spelling}": torch.ones(tiny.shapes[target])})
    assert [record.target for record in read(path, tiny)] == [target]


def test_no_two_tensors_share_a_spelling(tiny: Targets) -> None:
    assert set(tiny._spellings.values()) == set(tiny.shapes)
    for name in tiny.shapes:
        assert tiny._spellings[name.replace(".", "_")] == name


def test_products_with_zeros_are_left_out(tiny: Targets, tmp_path: Path) -> None:
    parts = factors(tiny)
    first = next(iter(parts))
    parts[first] = parts[first][0], torch.zeros_like(parts[first][1])
    found = read(write(tmp_path / "a.safetensors", spelled("kohya", parts)), tiny)
    assert {record.target for record in found} == {f"{name}.weight" for name in parts if name != first}


def test_a_file_that_changes_nothing_is_told(tiny: Targets, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = {name: (a_RK, torch.zeros_like(b_NR)) for name, (a_RK, b_NR) in factors(tiny).items()}
    path = write(tmp_path / "a.safetensors", spelled("kohya", parts))
    assert read(path, tiny) == []
    assert f"{path}: changes nothing" in caplog.text


def test_layers_of_image_models_are_left_out_with_a_warning(
    tiny: Targets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = factors(tiny)
    foreign = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(RANK, 256),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": torch.ones(256, RANK),
        "diffusion_model.img_emb.proj.0.diff": torch.ones(8),
    }
    with caplog.at_level(logging.WARNING):
        found = read(write(tmp_path / "a.safetensors", {**spelled("original", parts), **foreign}), tiny)
    assert len(found) == len(parts)
    for name in foreign:
        assert name in caplog.text


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("diffusion_model.blocks.7.self_attn.q.diff", (256, 256)),
        ("diffusion_model.blocks.0.self_attn.q.lora_B.bias", (256,)),
        ("diffusion_model.blocks.0.self_attn.attn_op.local_attn.proj_l.diff", (128, 128)),
        ("double_blocks.0.img_attn.qkv.diff", (256, 256)),
        ("diffusion_model.blocks.0.cross_attn.v.lora_down.weight", (4, 256)),
        ("diffusion_model.blocks.0.cross_attn.v.alpha", (1,)),
        ("something", (1,)),
    ],
)
def test_unknown_keys_are_refused_by_name(key: str, shape: tuple[int, ...], tiny: Targets, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {**spelled("original", factors(tiny)), key: torch.ones(shape)})
    with pytest.raises(CheckpointError, match=re.escape(key)):
        read(path, tiny)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("diffusion_model.blocks.0.self_attn.q.diff", (256, 255)),
        ("diffusion_model.blocks.0.self_attn.q.diff_b", (255,)),
        ("diffusion_model.blocks.0.diff_m", (1, 5, 256)),
        ("diffusion_model.blocks.0.norm3.diff", (512,)),
    ],
)
def test_differences_of_other_shapes_are_refused(
    key: str, shape: tuple[int, ...], tiny: Targets, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(key)):
        read(write(tmp_path / "a.safetensors", {key: torch.ones(shape)}), tiny)


@pytest.mark.parametrize(("down", "up"), [((4, 128), (256, 4)), ((4, 256), (128, 4)), ((4, 256), (256, 8))])
def test_factors_of_other_shapes_are_refused(
    down: tuple[int, int], up: tuple[int, int], tiny: Targets, tmp_path: Path
) -> None:
    module = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{module}.lora_down.weight": torch.zeros(down), f"{module}.lora_up.weight": torch.zeros(up)}
    with pytest.raises(CheckpointError, match="do not make"):
        read(write(tmp_path / "a.safetensors", tensors), tiny)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("lycoris_blocks_0_self_attn_q.hada_w1_a", "LoHa"),
        ("lycoris_blocks_0_self_attn_q.lokr_w1", "LoKr"),
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "DoRA"),
        ("base_model.model.blocks.0.self_attn.q.lora_magnitude_vector", "DoRA"),
        ("diffusion_model.blocks.0.self_attn.q.lora_mid.weight", "Tucker"),
        ("diffusion_model.blocks.0.self_attn.q.oft_blocks", "OFT"),
    ],
)
def test_other_adapters_are_refused_with_the_reason(key: str, reason: str, tiny: Targets, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {**spelled("original", factors(tiny)), key: torch.ones(4)})
    with pytest.raises(CheckpointError, match=reason):
        read(path, tiny)


def test_a_layer_in_two_spellings_is_refused(tiny: Targets, tmp_path: Path) -> None:
    parts = factors(tiny)
    both = {**spelled("original", parts), **spelled("diffusers", parts)}
    with pytest.raises(CheckpointError, match="both change"):
        read(write(tmp_path / "a.safetensors", both), tiny)


def test_files_that_are_no_safetensors_are_never_opened(tiny: Targets, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="only"):
        open_lora(tmp_path / "a.pt")
    (tmp_path / "a.pt").rename(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_lora(tmp_path / "a.safetensors")


def test_missing_files_folders_and_integers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_lora(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="a folder"):
        open_lora(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="floats"):
        open_lora(write(tmp_path / "c.safetensors", {"x": torch.ones(3, dtype=torch.int32)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, tiny: Targets, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"diffusion_model.blocks.0.norm3.diff": torch.full((256,), value)})
    with pytest.raises(CheckpointError, match="finite"):
        read(path, tiny)
