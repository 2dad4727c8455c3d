"""Commands on damaged files of users end with a message that names the file, or use what is still right in it."""

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.usage.damage import ODD, damaged_bytes, edited, edits, few, refused, run
from wanforge.configs.loading import CONFIGS
from wanforge.engines.bundle.bundle import Bundle

pytestmark = pytest.mark.slow
FILES = {
    "dit": "tiny-t2v-quant.pth",
    "vae": "Wan2.1_VAE.pth",
    "text-encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "tokenizer": "google/umt5-xxl/tokenizer.json",
}
"""The files of tiny-t2v by option."""
NUMBERS = count()


@pytest.fixture(scope="module")
def files(checkpoints: dict[str, Path], bundle_of: Callable[[str, str], Bundle]) -> dict[str, Path]:
    """The files of tiny-t2v by option, and its VAE as safetensors."""
    found = {option: checkpoints["tiny-t2v"] / name for option, name in FILES.items()}
    return {**found, "safetensors": bundle_of("tiny-t2v", "w8a8").root / "weights/vae.safetensors"}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[[str, str], Bundle]) -> Path:
    return bundle_of("tiny-t2v", "w8a8").root


@pytest.mark.parametrize("kind", [*FILES, "safetensors"])
@few
@given(data=st.data())
def test_damaged_checkpoints(files: dict[str, Path], kind: str, data: st.DataObject, scratch: Path) -> None:
    damaged, option = scratch / files[kind].name, "vae" if kind == "safetensors" else kind
    damaged.write_bytes(data.draw(damaged_bytes(files[kind].read_bytes(), most=1 << 12)))
    given_files = {option: files[option] for option in FILES} | {option: damaged}
    out = scratch / f"bundle {next(NUMBERS)}"
    words = [word for name, file in given_files.items() for word in (f"--{name}", file)]
    if not refused(run("import", *words, "--model", "tiny-t2v", "--out", out), damaged.name):
        assert not run("inspect", out, "--verify").exit_code
    shutil.rmtree(out, ignore_errors=True)


REQUESTS = [
    {"prompt": "a red circle", "seed": 3, "out": "a.mp4"},
    {"prompt": "a square", "samples": 2, "negative": "x", "steps": 2, "resolution": "64x64"},
]
"""The lines of a prompt file; one of them has a key that does not exist."""


@few
@given(data=st.data())
def test_damaged_prompt_files(bundle: Path, data: st.DataObject, scratch: Path) -> None:
    values = [edited(each, data.draw(edits(each, list(each)))) for each in REQUESTS]
    text = "".join(json.dumps(each) + "\n" for each in values).encode()
    path = scratch / "prompts.txt"
    path.write_bytes(data.draw(st.one_of(st.just(text), damaged_bytes(text))))
    words = ("--prompt-file", path, "--out", scratch / "clip.mp4", "--backend", "torch", "--dry-run")
    refused(run("generate", bundle, *words), "prompts.txt")


@pytest.mark.parametrize("name", ["models/tiny-t2v.toml", "recipes/w8a8.toml"])
@few
@given(data=st.data())
def test_damaged_configs(files: dict[str, Path], name: str, data: st.DataObject, scratch: Path) -> None:
    text = (CONFIGS / name).read_bytes()
    path = scratch / f"mine-{Path(name).name}"
    path.write_bytes(data.draw(st.one_of(damaged_bytes(text), with_other_value(text.decode()))))
    option = "--model" if name.startswith("models/") else "--recipe"
    words = [word for each in FILES for word in (f"--{each}", files[each])]
    other = ("--model", "tiny-t2v") if option == "--recipe" else ()
    refused(
        run("import", *words, option, path, *other, "--out", scratch / "bundle", "--dry-run"),
        path.name,
        *FILES.values(),
    )


@st.composite
def with_other_value(draw: st.DrawFn, text: str) -> bytes:
    """A TOML file in which one value is another."""
    lines = text.splitlines()
    where = draw(st.sampled_from([index for index, line in enumerate(lines) if " = " in line]))
    value = draw(st.sampled_from([each for each in ODD if each is not None]))
    key = lines[where].partition(" = ")[0]
    lines[where] = f"{key} = {json.dumps(value)}"
    return "\n".join(lines).encode(errors="replace")
