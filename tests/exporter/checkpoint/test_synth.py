"""Synthetic checkpoints match the published files in name and form, are reproducible, and are cheap at any size."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exporter.checkpoint.sources import T2V
from tests.golden import load_json
from tests.numerics import assert_matches
from wanforge.configs.loading import named
from wanforge.configs.model import load_model
from wanforge.errors import CheckpointError, ResourceError
from wanforge.exporter.checkpoint.layout import layout, published_recipe
from wanforge.exporter.checkpoint.reader import open_checkpoint
from wanforge.exporter.checkpoint.synth import file_names, published_layout, write_checkpoint
from wanforge.exporter.checkpoint.synthetic import torch_file, weights
from wanforge.exporter.checkpoint.synthetic.tokenizer import CORPUS, train_tokenizer
from wanforge.exporter.checkpoint.synthetic.torch_file import checksum_of_zeros
from wanforge.plugins.quantiser.reference import quantise_tiles
from wanforge.runtime.dtypes import STORED
from wanforge.runtime.inputs.text import Tokenizer

SUPPORT = {"Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"}
WEIGHTS = {"dit", "dit-quant", "vae", "text_encoder"}

# The names on huggingface.co/TurboDiffusion.
PUBLISHED = {
    "turbowan2.1-t2v-1.3b-480p": {"TurboWan2.1-T2V-1.3B-480P.pth", "TurboWan2.1-T2V-1.3B-480P-quant.pth"},
    "turbowan2.1-t2v-14b-480p": {"TurboWan2.1-T2V-14B-480P.pth", "TurboWan2.1-T2V-14B-480P-quant.pth"},
    "turbowan2.1-t2v-14b-720p": {"TurboWan2.1-T2V-14B-720P.pth", "TurboWan2.1-T2V-14B-720P-quant.pth"},
    "turbowan2.2-i2v-a14b-720p": {
        "TurboWan2.2-I2V-A14B-high-720P.pth",
        "TurboWan2.2-I2V-A14B-low-720P.pth",
        "TurboWan2.2-I2V-A14B-high-720P-quant.pth",
        "TurboWan2.2-I2V-A14B-low-720P-quant.pth",
    },
}


def content(folder: Path, parts: set[str], seed: int = 0) -> dict[str, bytes]:
    """Write parts of a checkpoint of tiny-t2v; return the contents of the files by name."""
    written = write_checkpoint(load_model("tiny-t2v"), folder, parts=parts, seed=seed)
    return {str(path.relative_to(folder)): path.read_bytes() for path in written}


@pytest.mark.parametrize("model_name", PUBLISHED)
def test_files_have_the_published_names(model_name: str) -> None:
    assert set(file_names(load_model(model_name)).values()) == PUBLISHED[model_name] | SUPPORT


@pytest.mark.parametrize("model_name", named("models"))
def test_no_two_files_share_a_name(model_name: str) -> None:
    names = list(file_names(load_model(model_name)).values())
    assert len(names) == len(set(names))


@pytest.mark.parametrize("failing", ["save", "fill"])
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((torch, "save") if failing == "save" else (torch_file, "fill")), full)
    with pytest.raises(OSError, match=r"No space left on device: '.*Wan2\.1_VAE\.pth'"):
        write_checkpoint(load_model("tiny-t2v"), tmp_path, parts={"vae"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100, 3_000, 1_000_003, 3_760_900])
def test_a_write_that_really_fails_leaves_nothing(
    tmp_path: Path, largest_file: Callable[[int], None], size: int
) -> None:
    largest_file(size)
    with pytest.raises(OSError, match=r"File too large: '.*Wan2\.1_VAE\.pth'"):
        write_checkpoint(load_model("tiny-t2v"), tmp_path, parts={"vae"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("present", ["tiny-t2v.pth", "google/umt5-xxl/tokenizer.json"])
def test_files_that_are_there_are_kept_unless_told(tmp_path: Path, present: str) -> None:
    (tmp_path / present).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / present).write_bytes(b"published")
    model, parts = load_model("tiny-t2v"), {"dit-quant", "dit", "tokenizer"}
    with pytest.raises(CheckpointError, match=rf"already holds {present}; choose another .* \(--replace\)"):
        write_checkpoint(model, tmp_path, parts=parts, sparse=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / present]
    assert (tmp_path / present).read_bytes() == b"published"
    write_checkpoint(model, tmp_path, parts={"vae"}, sparse=True)
    write_checkpoint(model, tmp_path, parts=parts, sparse=True, replace=True)
    assert (tmp_path / present).read_bytes() != b"published"


def test_a_link_of_a_published_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "tiny-t2v.pth").symlink_to(tmp_path / "elsewhere.pth")
    with pytest.raises(CheckpointError, match="already holds"):
        write_checkpoint(load_model("tiny-t2v"), tmp_path, parts={"dit"}, sparse=True)
    write_checkpoint(load_model("tiny-t2v"), tmp_path, parts={"dit"}, sparse=True, replace=True)
    assert not (tmp_path / "elsewhere.pth").exists()


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    model, needed = load_model("tiny-t2v"), sum(spec.nbytes for spec in published_layout(T2V, "dit").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, needed - 1))
    with pytest.raises(ResourceError, match=r"out: [\d.]+ MB are needed and [\d.]+ MB are free; make room, .*--sparse"):
        write_checkpoint(model, tmp_path / "out", parts={"dit"})
    assert not (tmp_path / "out").exists()
    assert write_checkpoint(model, tmp_path / "out", parts={"dit"}, sparse=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, needed))
    assert write_checkpoint(model, tmp_path / "full", parts={"dit"})


@pytest.mark.parametrize("sparse", [False, True])
def test_checksums_are_right(tmp_path: Path, sparse: bool) -> None:
    written = write_checkpoint(load_model("tiny-t2v"), tmp_path, parts=WEIGHTS, sparse=sparse)
    for path in written:
        content = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            for stored in open_checkpoint(path).values():
                record = stored.record
                assert record is not None
                assert record.checksum == zlib.crc32(content[record.offset :][: record.size]) != 0
                behind = content[record.offset + record.size :]
                assert behind[:8] == b"PK\x07\x08" + record.checksum.to_bytes(4, "little")
        if shutil.which("unzip"):
            assert subprocess.run(["unzip", "-tqq", path], capture_output=True).stdout == b""


@pytest.mark.parametrize("size", [0, 1, 2, 3, 255, 65536, 1_000_003])
def test_the_checksum_of_zeros_is_that_of_the_bytes(size: int) -> None:
    assert checksum_of_zeros(size) == zlib.crc32(bytes(size))


def test_the_checksum_of_many_zeros_continues_that_of_fewer() -> None:
    assert zlib.crc32(bytes(12_345), checksum_of_zeros(28 * 10**9)) == checksum_of_zeros(28_000_012_345)


def test_every_file_is_written(checkpoints: dict[str, Path]) -> None:
    for model_name, folder in checkpoints.items():
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert found == set(file_names(load_model(model_name)).values())


@pytest.mark.parametrize("model_name", ["tiny-t2v", "tiny-i2v"])
def test_pytorch_reads_every_file(checkpoints: dict[str, Path], model_name: str) -> None:
    model = load_model(model_name)
    for part, file in file_names(model).items():
        if part == "tokenizer":
            continue
        state = torch.load(checkpoints[model_name] / file, weights_only=True)
        specs = layout(part.partition("-")[0], model, published_recipe(part.endswith("-quant"), True))
        assert {n: (t.dtype, tuple(t.shape)) for n, t in state.items()} == {
            n: (STORED[spec.dtype], spec.shape) for n, spec in specs.items()
        }
        assert all(torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point())


@pytest.mark.parametrize("expert", ["", "-high", "-low"])
def test_quant_file_holds_the_plain_one_quantised(checkpoints: dict[str, Path], expert: str) -> None:
    model_name = "tiny-i2v" if expert else "tiny-t2v"
    stem = checkpoints[model_name] / (model_name + expert)
    plain = torch.load(stem.with_name(stem.name + ".pth"), weights_only=True)
    quant = torch.load(stem.with_name(stem.name + "-quant.pth"), weights_only=True)
    for name, tensor in quant.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "int8_weight":
            steps, scale = quantise_tiles(plain.pop(f"{owner}.weight"))
            assert_matches(tensor, steps, rms=0, name=name)
            assert_matches(quant[f"{owner}.scale"], scale, rms=0, name=name)
        elif leaf != "scale":
            assert_matches(tensor, plain.pop(name), rms=0, name=name)
    assert not plain, "the plain file holds tensors that the quant file lacks"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tensors of tiny models be drawn in several pieces."""
    monkeypatch.setattr(weights, "PIECE", 1 << 14)


@pytest.mark.usefixtures("small_pieces")
def test_quantised_weights_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, randn = list[int](), torch.randn

    def counted(number: int, **options: Any) -> torch.Tensor:
        drawn.append(number)
        return randn(number, **options)

    monkeypatch.setattr(torch, "randn", counted)
    content(tmp_path, {"dit-quant"})
    specs = published_layout(T2V, "dit-quant")
    assert sum(drawn) == sum(math.prod(spec.shape) for name, spec in specs.items() if not name.endswith(".scale"))
    assert len(drawn) > len(specs)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("part", sorted(WEIGHTS))
def test_the_number_of_processors_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    found = []
    for processors in (1, 5):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, count=processors: set(range(count)))
        found.append(content(tmp_path / str(processors), {part}))
    assert found[0] == found[1]


@pytest.mark.usefixtures("small_pieces")
def test_pieces_differ(tmp_path: Path) -> None:
    content(tmp_path, {"dit"})
    weight = torch.load(tmp_path / "tiny-t2v.pth", weights_only=True)["blocks.0.ffn.0.weight"]
    pieces = [each.flatten() for each in weight.split(weights.bands(tuple(weight.shape)))]
    assert len(pieces) > 2
    assert not [one for one, other in pairwise(pieces) if torch.equal(one, other)]


def test_as_many_threads_draw_as_there_are_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3)))
    together, begun = threading.Barrier(3, timeout=60), list[int]()

    def job(number: int) -> int:
        begun.append(number)
        together.wait()
        return number

    before = torch.get_num_threads()
    with weights.in_parallel(partial(job, number) for number in range(30)) as results:
        assert next(results) == 0
        assert max(begun) <= 6, "results that nobody has taken fill the memory"
        assert [*results] == list(range(1, 30))
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.parametrize("model_name", named("models"))
def test_scales_follow_their_weights_in_every_file(model_name: str) -> None:
    model = load_model(model_name)
    for part in file_names(model):
        if part.endswith("-quant"):
            order = {name: place for place, name in enumerate(published_layout(model, part))}
            scales = [name for name in order if name.endswith(".scale")]
            assert scales
            assert not [name for name in scales if order[name] < order[name.replace(".scale", ".int8_weight")]]


def test_experts_differ(checkpoints: dict[str, Path]) -> None:
    high, low = (
        torch.load(checkpoints["tiny-i2v"] / f"tiny-i2v-{expert}.pth", weights_only=True) for expert in ("high", "low")
    )
    assert not [name for name in high if torch.equal(high[name], low[name])]


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    once, again = content(tmp_path / "a", WEIGHTS), content(tmp_path / "b", WEIGHTS)
    assert once == again == {name: (checkpoints["tiny-t2v"] / name).read_bytes() for name in once}


def test_a_file_does_not_depend_on_the_others(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    alone = content(tmp_path, {"dit-quant"})
    assert alone == {"tiny-t2v-quant.pth": (checkpoints["tiny-t2v"] / "tiny-t2v-quant.pth").read_bytes()}
    assert {path.name for path in tmp_path.iterdir()} == set(alone)


def test_other_seed_changes_every_tensor(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    for file in content(tmp_path, WEIGHTS, seed=1):
        one = torch.load(checkpoints["tiny-t2v"] / file, weights_only=True)
        other = torch.load(tmp_path / file, weights_only=True)
        assert not [name for name in one if torch.equal(one[name], other[name])], file


def test_values_have_the_scale_of_trained_ones(checkpoints: dict[str, Path]) -> None:
    state = torch.load(checkpoints["tiny-t2v"] / "tiny-t2v.pth", weights_only=True)
    for name, (mean, deviation) in {
        "blocks.0.norm3.weight": (1.0, 0.1),
        "blocks.1.self_attn.norm_q.weight": (1.0, 0.1),
        "blocks.0.norm3.bias": (0.0, 0.02),
        "blocks.0.modulation": (0.0, 0.3),
        "blocks.0.ffn.0.weight": (0.0, 256**-0.5),
        "blocks.0.ffn.2.weight": (0.0, 512**-0.5),
    }.items():
        tensor = state[name].float()
        assert float(tensor.mean()) == pytest.approx(mean, abs=5 * deviation / tensor.numel() ** 0.5), name
        assert float(tensor.std()) == pytest.approx(deviation, rel=0.2), name


def test_interruption_leaves_nothing(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int, unit: str = "", /) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(load_model("tiny-t2v"), tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert content(tmp_path, {"dit"})
    assert [path.suffix for path in tmp_path.iterdir()] == [".pth"]


def test_progress_adds_up_to_the_tensors(tmp_path: Path) -> None:
    expected: dict[str, int] = {}
    seen: dict[str, int] = {}

    def progress(title: str, done: int, total: int, unit: str = "", /) -> None:
        assert unit == "B"
        expected[title], seen[title] = total, done

    write_checkpoint(load_model("tiny-t2v"), tmp_path, parts=WEIGHTS, progress=progress)
    assert seen == expected
    for file, total in expected.items():
        assert total == sum(stored.spec.nbytes for stored in open_checkpoint(tmp_path / file).values())


WRITE_SPARSE = """
import json, psutil, resource, sys
from pathlib import Path
from wanforge.configs.model import load_model
from wanforge.exporter.checkpoint.synth import write_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

write_checkpoint(load_model("tiny-t2v"), Path(sys.argv[1]), parts={"dit"}, sparse=True)
before = peak()
# Memory that is allocated but never touched does not show in the peak.
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (4 << 30), -1))
write_checkpoint(load_model("turbowan2.1-t2v-14b-720p"), Path(sys.argv[1]), parts={"dit-quant"}, sparse=True)
write_checkpoint(load_model("turbowan2.2-i2v-a14b-720p"), Path(sys.argv[1]), parts={"dit.low"}, sparse=True)
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
def test_sparse_14b_files_take_no_disk_and_little_memory(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", WRITE_SPARSE, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) < 200e6, "memory grows with the file"
    table = load_json("checkpoint_keys")
    for file, nbytes in {
        "TurboWan2.1-T2V-14B-720P-quant.pth": table["Wan2.1-14B-quant"]["bytes"],
        # Image-to-video has 20 more input channels, of 4 bfloat16 numbers each.
        "TurboWan2.2-I2V-A14B-low-720P.pth": table["Wan2.1-14B"]["bytes"] + 5120 * 20 * 4 * 2,
    }.items():
        stored = open_checkpoint(tmp_path / file)
        assert sum(tensor.spec.nbytes for tensor in stored.values()) == nbytes
        status = (tmp_path / file).stat()
        assert nbytes < status.st_size < nbytes + 2e6
        assert status.st_blocks * 512 < 20e6
        assert not any(next(iter(stored["head.modulation"].chunks())))
        (tmp_path / file).unlink()


def test_tokenizer_is_of_umt5s_kind(checkpoints: dict[str, Path]) -> None:
    tokenizer = Tokenizer(checkpoints["tiny-t2v"] / "google/umt5-xxl/tokenizer.json")
    assert [tokenizer.tokens.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert len(tokenizer) <= load_model("tiny-t2v").text_encoder.vocab_size
    for sentence in CORPUS:
        ids = tokenizer.encode(sentence, 512)
        assert ids[-1] == 1
        assert not {0, 1, 2} & set(ids[:-1]), "a piece of the corpus is not in the vocabulary"
        assert tokenizer.tokens.encode(sentence).ids == ids, "the file's own template ends differently"


@pytest.mark.parametrize("vocab_size", [120, 200, 512, 256384])
def test_tokenizer_is_no_larger_than_the_text_encoder(vocab_size: int) -> None:
    assert train_tokenizer(vocab_size).get_vocab_size() <= min(vocab_size, 384)


def test_tokenizer_is_the_same_every_time() -> None:
    assert len({train_tokenizer(512).to_str() for _ in range(5)}) == 1
