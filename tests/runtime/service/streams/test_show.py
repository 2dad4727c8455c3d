"""A stream while it is shown: real chunks and a real encoder, and a server that the test plays."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
import msgspec
import psutil
import pytest
import torch

from tests.leaks import nothing_left
from tests.processes import wait_until
from tests.video_reader import read_video
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.output.video import VideoError
from wanforge.runtime.pipeline import Pipeline, open_pipeline
from wanforge.runtime.service.catalogue import Asked
from wanforge.runtime.service.child.live import show as shows
from wanforge.runtime.service.child.live.samples import Samples
from wanforge.runtime.service.child.live.show import Show
from wanforge.runtime.service.child.live.streamed_clip import seekable, streamed
from wanforge.runtime.service.child.maker import StoppedError
from wanforge.runtime.service.child.messages import MakeClip
from wanforge.runtime.service.live.terms import LiveTerms
from wanforge.runtime.service.live.wire import (
    FROM_CHILD,
    LENGTH,
    ChunkShown,
    Link,
    NobodyWatchesError,
    StreamEnded,
    ToServer,
    VideoPiece,
    Wish,
    framed,
    listening,
)
from wanforge.runtime.streaming.live import live

pytestmark = pytest.mark.slow
PROMPT, OTHER, SIZE = "a red kite over a windy beach", "a blue train in the snow", (64, 32)
SECONDS = 60.0


@pytest.fixture(scope="module")
def pipeline(bundle_of: Callable[[str, str], Bundle]) -> Pipeline:
    return open_pipeline(bundle_of("tiny-causal", "bf16"), "ort")


@pytest.fixture(autouse=True)
def others() -> Iterator[set[psutil.Process]]:
    """The processes that other tests have left in this one; a stream leaves none, nor a thread or an open file."""
    before = set(psutil.Process().children())
    with nothing_left():
        yield before
    assert not set(psutil.Process().children()) - before


@dataclass
class Stage:
    """A stream, and the server that it is for.

    Attributes:
        heard: What the server has heard.
        reports: How often the stream said that all is well.
    """

    show: Show
    far: socket.socket
    heard: list[ToServer] = field(default_factory=list)
    reports: int = 0
    error: BaseException | None = None
    thread: threading.Thread | None = None
    may_stop: bool = False

    def report(self, stage: str, percent: int) -> None:
        self.reports += 1
        if self.may_stop:
            raise StoppedError

    def run(self) -> None:
        try:
            self.show.run(self.report)
        except BaseException as error:
            self.error = error

    def start(self) -> "Stage":
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        return self

    def hear(self, until: Callable[[], bool] = lambda: False) -> None:
        """Read what comes until something is true, or the connection ends."""
        reads = self.far.makefile("rb")
        while not until():
            head = reads.read(LENGTH.size)
            if len(head) < LENGTH.size:
                return
            self.heard.append(FROM_CHILD.decode(reads.read(LENGTH.unpack(head)[0])))

    def wish(self, **wish: object) -> None:
        self.far.sendall(framed(msgspec.convert(wish, Wish)))

    def end(self) -> None:
        assert self.thread is not None
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()

    @property
    def video(self) -> bytes:
        return b"".join(each.data for each in self.heard if isinstance(each, VideoPiece))

    @property
    def chunks(self) -> int:
        return sum(isinstance(each, ChunkShown) for each in self.heard)


@contextmanager
def staged(pipeline: Pipeline, folder: Path, chunks: int = 4, **terms: object) -> Iterator[Stage]:
    """A stream that is about to be shown."""
    made = live(pipeline, PROMPT, chunks=chunks, size=SIZE, seed=7, cache="infinity_rope")
    given = msgspec.convert({"screen": "s", "chunks": chunks, "is_paced": False, **terms}, LiveTerms)
    with listening(folder) as server:
        link = Link(folder, "s")
        far, _ = server.accept()
    stage = Stage(Show(made, given, link, folder / "live.mp4"), far)
    try:
        yield stage
    finally:
        far.close()
        if stage.thread is not None:
            stage.end()


def held(show: Show) -> None:
    """Wait until a stream waits for its reader, and nothing more is made."""
    before = -1
    while not (show._carrier.is_sending and before == show.chunks):
        before = show.chunks
        time.sleep(0.5)


def test_what_is_watched_is_what_is_kept(pipeline: Pipeline, tmp_path: Path) -> None:
    with staged(pipeline, tmp_path, chunks=6) as stage:
        stage.start().hear()
        stage.end()
    assert stage.error is None
    assert stage.heard[-1] == StreamEnded("length")
    assert stage.show.reason == "length"  # also after it has hung up
    assert [each.frames for each in stage.heard if isinstance(each, ChunkShown)] == [1, 9, 17, 25, 33, 41]
    kept = (tmp_path / "live.mp4").read_bytes()
    assert stage.video == kept
    assert read_video(tmp_path / "live.mp4")[1].shape == (41, 32, 64, 3)
    assert stage.show.samples.count == 41


def test_prompts_and_pauses_are_obeyed(pipeline: Pipeline, tmp_path: Path) -> None:
    with staged(pipeline, tmp_path, chunks=400) as stage:
        stage.start().hear(lambda: stage.chunks >= 2)
        for _ in range(100):
            stage.wish(prompt=OTHER, is_cut=True)
        stage.wish(prompt="x " * 1000)  # which the server would have refused
        shown = lambda: [each.prompt for each in stage.heard if isinstance(each, ChunkShown)]  # noqa: E731
        stage.hear(lambda: OTHER in shown())
        stage.wish(is_paused=True)
        listening_ = threading.Thread(target=stage.hear)
        listening_.start()
        wait_until(lambda: stage.show._paused_at is not None, SECONDS)
        settled = -1
        while settled != stage.chunks:
            settled = stage.chunks
            time.sleep(0.5)
        before = stage.reports
        wait_until(lambda: stage.reports > before + 2, SECONDS)  # so nobody takes a pause for a stream that hangs
        stage.wish(is_paused=False)
        wait_until(lambda: stage.chunks > settled, SECONDS)
        stage.wish(ends=True)
        stage.end()
        listening_.join(SECONDS)
    assert stage.error is None
    assert stage.heard[-1] == StreamEnded("stopped")
    assert set(shown()) == {PROMPT, OTHER}


def test_a_stream_that_is_stopped_at_once_has_one_chunk(pipeline: Pipeline, tmp_path: Path) -> None:
    with staged(pipeline, tmp_path, chunks=400) as stage:
        stage.wish(ends=True)
        stage.start().hear()
        stage.end()
    assert (stage.error, stage.heard[-1]) == (None, StreamEnded("stopped"))
    assert stage.show.chunks >= 1


def test_a_slow_reader_holds_the_denoiser_back(pipeline: Pipeline, tmp_path: Path) -> None:
    with staged(pipeline, tmp_path, chunks=4000) as stage:
        stage.start()
        held(stage.show)
        assert stage.show._carrier.count < 300_000
        reports = stage.reports
        wait_until(lambda: stage.reports > reports + 2, SECONDS)  # so it is not taken for a stream that hangs
        assert stage.show.chunks < 2000
        stage.far.close()
        stage.end()
    assert stage.error is None
    assert stage.show.reason == "reader"
    assert len(read_video(tmp_path / "live.mp4")[1]) == stage.show.samples.count


def test_what_was_shown_is_kept_when_the_watcher_goes(pipeline: Pipeline, tmp_path: Path) -> None:
    with staged(pipeline, tmp_path, chunks=4000) as stage:
        stage.start().hear(lambda: stage.chunks >= 3)
        stage.far.close()
        stage.end()
    assert (stage.error, stage.show.reason) == (None, "reader")
    assert len(read_video(tmp_path / "live.mp4")[1]) == stage.show.samples.count >= 17


def test_nothing_is_made_for_nobody(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with staged(pipeline, tmp_path) as stage:
        play, gone = stage.show._play, stage.show._ends

        def late() -> None:
            assert gone.wait(SECONDS)  # so that it is noticed before the first chunk
            play()

        monkeypatch.setattr(stage.show, "_play", late)
        stage.far.shutdown(socket.SHUT_RDWR)
        stage.start().end()
    assert isinstance(stage.error, NobodyWatchesError)
    assert (stage.show.chunks, (tmp_path / "live.mp4").exists()) == (0, False)


def test_a_killed_encoder_ends_the_stream_with_its_error(
    pipeline: Pipeline, tmp_path: Path, others: set[psutil.Process]
) -> None:
    with staged(pipeline, tmp_path, chunks=4000) as stage:
        stage.start().hear(lambda: stage.chunks >= 2)
        (encoder,) = set(psutil.Process().children()) - others
        encoder.kill()
        stage.hear()
        stage.end()
    assert isinstance(stage.error, VideoError)
    assert "the video encoder stopped" in str(stage.error)
    assert not any(isinstance(each, StreamEnded) for each in stage.heard)


def test_an_encoder_that_hangs_is_not_taken_for_a_slow_reader(
    pipeline: Pipeline, tmp_path: Path, others: set[psutil.Process]
) -> None:
    with staged(pipeline, tmp_path, chunks=4000) as stage:
        stage.start().hear(lambda: stage.chunks >= 2)
        (encoder,) = set(psutil.Process().children()) - others
        encoder.send_signal(signal.SIGSTOP)
        reading = threading.Thread(target=stage.hear)
        reading.start()
        told = list[int]()

        def is_silent() -> bool:
            told.append(stage.reports)
            time.sleep(10 * shows.LOOK_SECONDS)
            return told[-1] == stage.reports

        wait_until(is_silent, SECONDS)
        encoder.kill()
        stage.end()
        reading.join(SECONDS)
    assert isinstance(stage.error, VideoError)


def test_a_full_disk_ends_the_stream(pipeline: Pipeline, tmp_path: Path) -> None:
    with staged(pipeline, tmp_path, chunks=4000) as stage:
        stage.show._carrier.file = Path("/dev/full")
        stage.start().hear()
        stage.end()
    assert isinstance(stage.error, OSError)
    assert stage.error.errno == 28


@pytest.mark.parametrize(
    ("terms", "reason"),
    [({"seconds": 0.2}, "limit"), ({"megabytes": 0.01}, "limit")],
)
def test_a_stream_ends_at_its_limits(pipeline: Pipeline, tmp_path: Path, terms: dict[str, float], reason: str) -> None:
    with staged(pipeline, tmp_path, chunks=10_000, **terms) as stage:
        stage.start().hear()
        stage.end()
    assert (stage.error, stage.show.reason) == (None, reason)
    assert stage.heard[-1] == StreamEnded(reason)  # type: ignore[arg-type]


def test_a_pause_that_is_too_long_ends_the_stream(pipeline: Pipeline, tmp_path: Path) -> None:
    with staged(pipeline, tmp_path, chunks=4000, pause_seconds=0.2) as stage:
        stage.start().hear(lambda: stage.chunks >= 2)
        stage.wish(is_paused=True)
        stage.hear()
        stage.end()
    assert (stage.error, stage.heard[-1]) == (None, StreamEnded("paused"))


def test_a_stream_that_is_paused_before_it_begins_ends_with_one_chunk(pipeline: Pipeline, tmp_path: Path) -> None:
    with staged(pipeline, tmp_path, chunks=4000, pause_seconds=0.2) as stage:
        stage.show._obey(Wish(is_paused=True))
        stage.start().hear()
        stage.end()
    assert (stage.error, stage.heard[-1]) == (None, StreamEnded("paused"))
    assert stage.chunks >= 1


def test_a_pause_that_ends_while_it_is_looked_at_harms_nobody(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged(pipeline, tmp_path) as stage:
        times = iter([0.0, 0.0])  # and None from then on
        given = property(lambda show: next(times, None), lambda show, value: None)
        monkeypatch.setattr(Show, "_paused_at", given, raising=False)
        stage.show._look(stage.report)
        assert next(times) == 0.0
        monkeypatch.undo()
        stage.start().hear()


def test_a_paced_stream_is_no_faster_than_it_is_played(pipeline: Pipeline, tmp_path: Path) -> None:
    with staged(pipeline, tmp_path, chunks=6, is_paced=True) as stage:
        begun = time.monotonic()
        stage.start().hear()
        stage.end()
    assert time.monotonic() - begun >= 41 / 16 - shows.AHEAD_SECONDS - 8 / 16
    assert stage.error is None


def test_what_is_cancelled_ends_at_once(pipeline: Pipeline, tmp_path: Path) -> None:
    with staged(pipeline, tmp_path, chunks=4000) as stage:
        stage.start()
        held(stage.show)
        stage.may_stop = True
        stage.end()
    assert isinstance(stage.error, StoppedError)


def test_samples_take_no_more_room_for_a_long_video(tmp_path: Path) -> None:
    samples = Samples()
    for number in range(5000):
        samples(torch.full((8, 16, 3), number % 256, dtype=torch.uint8))
    assert len(samples._kept) <= 33
    files, sheet = samples.draw(tmp_path)
    assert sorted(files) == ["spritesheet", "thumbnail"]
    places = sheet["frames"]
    assert len(places) == 16
    assert places == sorted(set(places))
    assert places[0] < 500
    assert places[-1] > 4000


def test_samples_keep_no_chunk(tmp_path: Path) -> None:
    samples, chunk = Samples(), torch.zeros(12, 8, 16, 3, dtype=torch.uint8)
    for frame in chunk:
        samples(frame)
    assert {frame.untyped_storage().nbytes() for _, frame in samples._kept} == {8 * 16 * 3}


def test_a_stream_that_becomes_a_clip_can_be_cancelled(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged(pipeline, tmp_path, chunks=3) as stage:
        stage.start().hear()
        stage.end()
    seekable(tmp_path / "live.mp4", tmp_path / "video.mp4", stage.report)
    assert read_video(tmp_path / "video.mp4")[1].shape == (17, 32, 64, 3)
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\nfor last; do :; done\nwhile :; do echo >> "${last#file:}"; sleep 0.01; done\n')
    slow.chmod(0o700)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(slow))

    def stop(stage: str, percent: int) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        seekable(tmp_path / "live.mp4", tmp_path / "other.mp4", stop)
    slow.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    with pytest.raises(VideoError, match="no such luck"):
        seekable(tmp_path / "live.mp4", tmp_path / "other.mp4", stop)


def test_a_clip_that_was_watched_tells_its_loras(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.loras, "described", lambda choices: [{"file": "/somewhere", "strength": 0.5}])
    terms = LiveTerms(screen="s", chunks=2, is_paced=False)
    asked = Asked(
        model="m",
        recipe="r",
        prompt=PROMPT,
        width_px=64,
        height_px=32,
        frames=9,
        fps=16,
        seed=7,
        steps=4,
        is_causal=True,
        live=terms,
    )
    order = MakeClip("job/1", "", {}, None, str(tmp_path), service=str(tmp_path))
    with listening(tmp_path) as server:

        def hear() -> None:
            far, _ = server.accept()
            with far, far.makefile("rb") as reads:
                while reads.read(1 << 16):
                    pass

        hearing = threading.Thread(target=hear)
        hearing.start()
        made = streamed(pipeline, asked.request(None), asked, order, lambda stage, percent: None)
        hearing.join(SECONDS)
    assert made.details["loras"] == [{"strength": 0.5}]
    assert (made.details["frames"], made.details["ended"]) == (9, "length")
