"""A person who watches a live stream on the page, and changes what it shows."""

from collections.abc import Callable, Iterator

import pytest

from tests.processes import wait_until
from tests.runtime.service.streams.rig import OTHER, PROMPT, SECONDS, LiveRig, live_server
from tests.runtime.service.web.page.browser import Browser, Keys
from tests.runtime.service.web.page.test_looks import wrong
from wanforge.engines.bundle.bundle import Bundle

pytestmark = pytest.mark.slow

PLAYS = """
const player = document.getElementById("live-video");
return !player.error && player.videoWidth === 64 && player.currentTime > arguments[0];
"""
TIME = "return document.getElementById('live-video').currentTime"


@pytest.fixture(scope="module")
def live(bundle_of: Callable[[str, str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRig]:
    bundle = bundle_of("tiny-causal", "bf16").root
    with live_server(bundle, tmp_path_factory.mktemp("live"), live_seconds=120.0) as found:
        yield found


@pytest.fixture
def page(window: Browser, live: LiveRig) -> Iterator[Browser]:
    """The page, which must have nothing to complain of, and ends its stream when it is left."""
    window.complaints()
    yield window
    complaints = window.complaints()
    window.leave()
    live.is_free()
    assert complaints == []


def begin(page: Browser, live: LiveRig, *size: object) -> None:
    """Start a stream, and wait until it plays."""
    page.open(live.server.url, *size)  # type: ignore[arg-type]
    page.type("#prompt", PROMPT)
    page.type("#size", "64x32")
    page.press("#watch")
    wait_until(lambda: page.run(PLAYS, 0.0), SECONDS)
    page.await_("#live-state", "Live")


def test_a_stream_is_watched_and_steered_with_the_keyboard_alone(page: Browser, live: LiveRig) -> None:
    page.open(live.server.url)
    page.tab_to("#prompt")
    page.driver.switch_to.active_element.send_keys(PROMPT)
    page.tab_to("#size")
    page.driver.switch_to.active_element.send_keys("64x32")
    page.tab_to("#watch")
    page.key(Keys.ENTER)
    wait_until(lambda: page.run(PLAYS, 0.5), SECONDS)
    assert page.run("return document.activeElement.id") == "live-prompt"
    page.await_(".in_progress .stage", "live")
    page.driver.switch_to.active_element.send_keys(OTHER, Keys.ENTER)
    page.await_("#live-shown", f"Shown: {OTHER}")
    assert page.run("return document.getElementById('news').textContent") == "It changes soon."
    page.tab_to("#live-cut")
    page.key(Keys.ENTER)
    wait_until(lambda: "new scene" in page.run("return document.getElementById('news').textContent"), SECONDS)
    page.tab_to("#live-pause")
    page.key(Keys.SPACE)
    page.await_("#live-state", "Paused")
    (screen,) = live.server.service.screens._by_job.values()
    assert screen.is_paused
    page.key(Keys.SPACE)
    page.await_("#live-state", "Live")
    before = page.run(TIME)
    wait_until(lambda: page.run(PLAYS, before), SECONDS)
    page.tab_to("#live-stop")
    page.key(Keys.ENTER)
    page.await_("#live-state", "Ended")
    assert page.run("return document.activeElement.id") == "live"
    page.await_(".completed .play")
    assert page.find("#watch").is_enabled()


def test_who_leaves_the_page_ends_the_stream(page: Browser, live: LiveRig) -> None:
    begin(page, live)
    (job,) = live.server.service.screens._by_job
    page.leave()
    assert live.ended(job)["status"] == "completed"


def test_a_refused_prompt_and_a_broken_stream_are_told(page: Browser, live: LiveRig) -> None:
    begin(page, live)
    page.type("#live-prompt", "x " * 600)
    page.press("#live-change")
    page.await_("#live-error", "tokens")
    live.workers.child.kill()
    page.await_("#live-state", "Broken off")
    page.await_("#live-error", "died")
    page.await_(".failed")
    live.workers.wait(lambda: not live.workers.obstacles)


def test_what_is_wrong_with_the_first_request_is_said_at_its_field(page: Browser, live: LiveRig) -> None:
    page.open(live.server.url)
    page.press("#watch")
    page.await_("#prompt-error", "prompt is missing")
    assert page.find("#watch").is_enabled()
    assert not page.find("#live").is_displayed()


def test_a_browser_that_cannot_play_streams_asks_for_none(page: Browser, live: LiveRig) -> None:
    page.open(live.server.url)
    page.run("delete window.MediaSource")
    page.type("#prompt", PROMPT)
    page.press("#watch")
    page.await_("#form-error", "cannot play a video that grows")
    assert live.server.service.screens.count == 0
    assert page.find("#watch").is_enabled()


def test_a_stream_that_cannot_be_played_is_left(page: Browser, live: LiveRig) -> None:
    page.open(live.server.url)
    page.run("MediaSource.prototype.addSourceBuffer = () => { throw new Error('this codec is unknown'); }")
    page.type("#prompt", PROMPT)
    page.type("#size", "64x32")
    page.press("#watch")
    page.await_("#live-state", "Broken off")
    live.is_free()  # although the page is still open
    page.await_("#live-error", "this codec is unknown")


def test_a_seed_that_javascript_would_round_is_refused(page: Browser, live: LiveRig) -> None:
    page.open(live.server.url)
    page.type("#prompt", PROMPT)
    page.type("#seed", str(2**53 + 1))
    page.press("#watch")
    page.await_("#seed-error", f"seed is {2**53 + 1}; give a whole number up to {2**53 - 1}")
    assert live.server.service.screens.count == 0


def test_the_stream_can_be_seen_and_steered_at_any_width(page: Browser, live: LiveRig) -> None:
    for width, scheme in ((360, "light"), (800, "dark"), (1600, "light")):
        begin(page, live, width, 800, scheme)
        page.await_("#live-shown", "Shown")
        wait_until(lambda: not page.run("return document.getAnimations().length"))
        found = [wrong(page, look) for look in ("cutOff", "overlaps", "pale", "sharedIds")]
        assert found == [[]] * len(found), (width, scheme)
        tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        names = {node.get("name", {}).get("value", "") for node in tree if not node.get("ignored", False)}
        assert {"Live stream", f"Live stream: {PROMPT}", "What it shows next", "New scene", "Pause", "Stop"} <= names
        page.press("#live-stop")
        page.await_("#live-state", "Ended")
