"""LoRAs of the service: the operator names their files, and clients only the names."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.runtime.lora.lora_files import lora
from tests.runtime.service.served import Rig
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError, RequestError
from wanforge.runtime.service.catalogue import Asked, Catalogue, fingerprint
from wanforge.runtime.service.child.messages import BundlePlace, MakeClip, SetUp
from wanforge.runtime.service.child.pipelines import Pipelines
from wanforge.runtime.service.commands.client import client
from wanforge.runtime.service.job import Submission
from wanforge.runtime.service.settings import load_settings

BundleOf = Callable[[str, str], Bundle]
ASKED = {"model": "m", "recipe": "r", "prompt": "a kite", "width_px": 96, "height_px": 64, "frames": 5, "fps": 16}


def settings(folder: Path, texts: str) -> Path:
    path = folder / "serve.toml"
    path.write_text(f'[[bundles]]\npath = "bundle"\nloras.clay = {texts}\n')
    return path


def test_settings_name_files_from_their_folder(tmp_path: Path) -> None:
    found = load_settings(settings(tmp_path, '["clay.safetensors:0.8", "high=/x/b.safetensors"]'))
    assert found.bundles[0].loras == {"clay": (f"{tmp_path}/clay.safetensors:0.8", "high=/x/b.safetensors:1.0")}
    with pytest.raises(ConfigError, match=r"bundles\.loras"):
        load_settings(settings(tmp_path, '["clay.safetensors:nan"]'))


@pytest.mark.slow
def test_requests_name_loras_that_are_served(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    (served,) = Catalogue.open([("m", bundle.root)], {bundle.root: ["clay"]}).served
    served.check(Asked(**ASKED, seed=0, steps=1, lora="clay"), None)  # type: ignore[arg-type]
    for name in ("Clay", "/etc/passwd", "clay.safetensors"):
        with pytest.raises(RequestError, match="no LoRA of m is called") as raised:
            served.check(Asked(**ASKED, seed=0, steps=1, lora=name), None)  # type: ignore[arg-type]
        assert raised.value.field == "lora"


@pytest.mark.slow
def test_a_clip_is_made_with_the_lora_that_is_named(bundle_of: BundleOf, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    texts = (f"{lora(tmp_path / 'a.safetensors', size=0.5)}:1.0",)
    place = BundlePlace(fingerprint(bundle), str(bundle.root), {"clay": texts})
    pipelines = Pipelines(SetUp("", (place,), "ort", None, 1))
    assert pipelines.load((place,), lambda stage, percent: None) == {}

    told: list[object] = []

    def made(number: int, **more: object) -> bytes:
        folder = tmp_path / str(number)
        folder.mkdir()
        request = {**ASKED, "seed": 3, "steps": 1, **more}
        order = MakeClip("job/1", place.fingerprint, request, None, str(folder))
        result = pipelines.make(order, lambda stage, percent: None)
        told.append(result.details["loras"])
        return (folder / result.files["video"]).read_bytes()

    base = made(1)
    assert made(2, lora="clay") != base
    assert made(3) == base
    used = {"sha256": sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest(), "strength": 1.0, "expert": None}
    assert told == [[], [{**used, "ways": ["side path"]}], []]
    with pytest.raises(RequestError, match="not served any more"):
        made(4, lora="other")


@pytest.mark.slow
def test_a_lora_that_cannot_be_used_is_told_and_its_bundle_is_served(
    bundle_of: BundleOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    place = BundlePlace(fingerprint(bundle), str(bundle.root), {"clay": (str(tmp_path / "none.safetensors"),)})
    pipelines = Pipelines(SetUp("", (place,), "ort", None, 1))
    assert pipelines.load((place,), lambda stage, percent: None) == {}
    assert (
        f"{bundle.root}: the LoRA 'clay' cannot be used: {tmp_path / 'none.safetensors'}: no such file" in caplog.text
    )


def test_a_video_tells_how_its_loras_acted(rig: Rig) -> None:
    rig.submit()
    known = rig.claim()
    request = {**known.request, "lora": "clay"}
    asked = Submission(owner="local", bundle=known.bundle, shape=known.shape, steps=known.steps, request=request)
    video = rig.store.submit(asked).job.id
    assert rig.client.get(f"/v1/videos/{video}").json()["loras"] is None
    used = {"sha256": "0" * 64, "strength": 0.8, "expert": None}
    told = [{**used, "ways": ["merge", "side path"]}, {**used, "ways": ["side path"]}]
    rig.complete(rig.claim(), loras=told)
    assert rig.client.get(f"/v1/videos/{video}").json()["loras"] == told
    done = CliRunner().invoke(client, ["--url", rig.url, "status", video])
    assert done.stdout == f"{video}  completed, 100 %, LoRA clay merged and beside the quantised weights\n"
