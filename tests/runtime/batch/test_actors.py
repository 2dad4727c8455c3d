"""Actors make the clips that processes make, and one that dies is replaced."""

import json
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.processes import command, free_port, wait_until
from tests.runtime.batch.conftest import PROMPTS, SMALL, clips
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ResourceError
from wanforge.runtime.batch.actors import ActorAnswer, ClipActor, connected
from wanforge.runtime.batch.orders import ClipOrder, Defaults, Ordering
from wanforge.runtime.batch.places import opened
from wanforge.runtime.batch.processes import HALVES, MAKER, Pools
from wanforge.runtime.inputs.prompts import PromptLine
from wanforge.runtime.service.child.messages import BundlePlace, SetUp
from wanforge.runtime.service.job import Failure
from wanforge.runtime.service.results.base import StorageError
from wanforge.runtime.service.results.folder import FolderStorage

PRETEND = SetUp("tests.runtime.batch.pretend_maker", (BundlePlace("0" * 32, "bundle"),))


def order_of(bundle: Bundle, prompt: str) -> ClipOrder:
    frames, steps = SMALL[1], SMALL[3]
    ordering = Ordering(bundle, Defaults(bundle.model.video.shape(None, int(frames)), int(steps)))
    orders, _ = ordering.read([PromptLine(prompt)], ())
    return orders[0].order


def actor(bundle: Bundle, maker: str, out: Path) -> ClipActor:
    place = BundlePlace(Ordering(bundle, Defaults(bundle.model.video.shape(None, None))).fingerprint, str(bundle.root))
    made = ClipActor(msgspec.msgpack.encode(SetUp(maker, (place,))), str(out))
    assert made.ready() == ""
    return made


@pytest.mark.slow
def test_an_actor_hands_latents_to_another(tinywan: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tinywan)
    order = order_of(bundle, PROMPTS[0])
    message = msgspec.msgpack.encode(order)
    whole = actor(bundle, MAKER, tmp_path).make(message, None)
    before = (tmp_path / order.name).read_bytes()
    (tmp_path / order.name).unlink()
    denoising, decoding = (actor(bundle, maker, tmp_path) for maker in HALVES)
    latents = denoising.make(message, None)
    answer = msgspec.msgpack.decode(decoding.make(message, latents), type=ActorAnswer)
    assert answer.failure is None
    assert answer.clip is not None
    assert {"denoise", "decode", "write"} <= set(answer.clip.stages)
    assert (tmp_path / order.name).read_bytes() == before
    clip = msgspec.msgpack.decode(whole, type=ActorAnswer).clip
    assert clip is not None
    assert (clip.bytes, clip.sha256) == (answer.clip.bytes, answer.clip.sha256)


@pytest.mark.slow
def test_an_actor_leaves_nothing_on_its_machine_but_clips_in_a_bucket(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = ClipActor(msgspec.msgpack.encode(PRETEND), bucket)
    for order in (ClipOrder(key=digit * 32, request={}) for digit in "ab"):
        answer = msgspec.msgpack.decode(made.make(msgspec.msgpack.encode(order), None), type=ActorAnswer)
        assert answer.failure is None
        with opened(bucket) as storage:
            assert storage.local(order.name).read_text() == "700"
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", ["disk_full", "storage_refused"])
def test_an_actor_tells_what_its_storage_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def refuse(*_: object) -> None:
        raise StorageError(code, "clips: free some space")

    monkeypatch.setattr(FolderStorage, "add", refuse)
    made = ClipActor(msgspec.msgpack.encode(PRETEND), str(tmp_path / "clips"))
    message = msgspec.msgpack.encode(ClipOrder(key="a" * 32, request={}))
    answer = msgspec.msgpack.decode(made.make(message, None), type=ActorAnswer)
    assert answer.failure == Failure(code, "clips: free some space")


@pytest.mark.slow
def test_an_actor_tells_what_failed(tinywan: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tinywan)
    order = order_of(bundle, PROMPTS[0])
    wrong = msgspec.structs.replace(order, request={**order.request, "steps": 99})
    answer = msgspec.msgpack.decode(
        actor(bundle, HALVES[0], tmp_path).make(msgspec.msgpack.encode(wrong), None), type=ActorAnswer
    )
    assert answer.failure is not None
    assert answer.failure.code == "invalid_request"
    assert not answer.is_last
    assert list(tmp_path.glob("*.mp4")) == []


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nowhere", "127.0.0.1:nothing"])
def test_a_cluster_that_does_not_answer_is_told_at_once(address: str) -> None:
    pytest.importorskip("ray")
    with (
        pytest.raises(ResourceError, match=r"there is no Ray at '.*'.* --ray local"),
        connected(address.format(port=free_port()), Pools()),
    ):
        pass


@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced(tinywan: Path, prompts: Path, tmp_path: Path, undisturbed: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "clips"
    words = ("batch", prompts, "--bundle", tinywan, "--out", out, *SMALL, "--ray", "local", "--json", "--retries", 9)
    with command(*words) as process:
        wait_until(lambda: len(clips(out)) >= 1, 300)
        every = psutil.Process(process.pid).children(recursive=True)
        killed = [each for each in every if each.name().startswith("ray::ClipActor")]
        for each in killed:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert clips(out) == clips(undisturbed / "clips")
    assert json.loads(said)["deaths"] <= len(killed) <= 1  # no more than one, whenever it came
    assert psutil.wait_procs(every, timeout=60)[1] == []
