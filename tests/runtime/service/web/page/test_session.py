"""A person with the page in a browser: from a prompt to clips that are seen, kept and compared."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.processes import wait_until
from tests.runtime.service.served import Rig, running
from tests.runtime.service.web.page.browser import Browser, Keys
from tests.runtime.service.web.page.studio import STAGES, Studio, clip, open_studio
from wanforge.runtime.service.job import Job
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.base import JobFilter

pytestmark = pytest.mark.slow

IS_PLAYING = """
const players = [...document.querySelectorAll(arguments[0])];
return players.every((player) => !player.paused && player.currentTime > 0);
"""
NOTE_TIMES = """
window.seen = new Set();
const note = () => seen.add(document.querySelector(".card:last-child .times").textContent);
new MutationObserver(note).observe(document.body, { childList: true, subtree: true, characterData: true });
"""
FETCHED = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
PROMPT = "a red circle moving right"


def jobs(rig: Rig) -> list[Job]:
    """All jobs of a server, latest first."""
    return list(rig.store.jobs(JobFilter(limit=100)).jobs)


def test_a_video_is_made_and_played_with_the_keyboard_alone(browser: Browser, rig: Rig, studio: Studio) -> None:
    browser.open(rig.url)
    browser.tab_to("#prompt")
    browser.driver.switch_to.active_element.send_keys(PROMPT)
    browser.tab_to("#seed")
    browser.driver.switch_to.active_element.send_keys("7")
    browser.key(Keys.CONTROL, Keys.ENTER)
    browser.await_(".completed .times", "text 0.50 s; torch, w8a8")
    browser.await_(".facts", "tinywan, 128x112, 21 frames, 4 steps, seed 7")
    browser.tab_to(".play")
    browser.key(Keys.ENTER)
    wait_until(lambda: browser.run(IS_PLAYING, ".card video"))
    browser.tab_to(".remix")
    browser.key(Keys.ENTER)
    assert browser.run("return document.activeElement.id") == "prompt"


def test_progress_and_stages_are_told_while_a_video_is_made(browser: Browser, rig: Rig, studio: Studio) -> None:
    studio.may_go_on.clear()
    browser.open(rig.url)
    browser.submit(PROMPT)
    browser.submit("another")
    browser.await_(".in_progress .status", "Being made")
    browser.await_(".in_progress .stage", "18 %, text")
    browser.await_(".queued .stage", "next")
    assert browser.run("return document.querySelector('.in_progress progress').value") == 18
    browser.run(NOTE_TIMES)
    studio.may_go_on.set()
    browser.await_(".card:last-child .play")
    seen = browser.run("return [...seen].join()")
    assert all(re.search(rf"{stage} (0\.0[1-9]|0\.[1-9]|[1-9])", seen) for stage in STAGES[:-1]), seen
    browser.await_(".card:first-child .play")


def test_the_gallery_survives_a_reload_and_videos_go_on(browser: Browser, rig: Rig, studio: Studio) -> None:
    rig.submit(prompt="before")
    browser.open(rig.url)
    browser.await_(".completed .prompt", "before")
    studio.may_go_on.clear()
    browser.submit(PROMPT)
    browser.await_(".in_progress")
    browser.driver.refresh()
    browser.await_(".completed .prompt", "before")
    browser.await_(".in_progress .stage", "text")
    studio.may_go_on.set()
    browser.await_(".card:first-child.completed")


def test_more_videos_are_shown_when_they_are_asked_for(browser: Browser, rig: Rig) -> None:
    for _ in range(25):
        rig.store.cancel(rig.submit()["id"])
    browser.open(rig.url)
    browser.press("#more")
    wait_until(lambda: browser.count(".card") == 25)
    assert not browser.find("#more").is_displayed()


def test_cancel_retry_remix_and_delete(browser: Browser, rig: Rig, studio: Studio) -> None:
    studio.may_go_on.clear()
    browser.open(rig.url)
    browser.submit(PROMPT, seed="5", steps="2")
    browser.press(".in_progress .cancel")
    browser.await_(".cancelled .status", "Cancelled")
    browser.press(".cancelled .retry")
    browser.await_(".in_progress")
    assert jobs(rig)[0].request == jobs(rig)[1].request
    browser.press(".in_progress .remix")
    browser.type("#prompt", "broken")
    studio.may_go_on.set()
    browser.press("#submit")
    browser.await_(".failed .why", "the GPU's memory is full; make a smaller clip")
    assert jobs(rig)[0].request == {**jobs(rig)[1].request, "prompt": "broken"}
    browser.press(".failed .delete")
    wait_until(lambda: browser.count(".card") == 2)
    assert len(jobs(rig)) == 2
    assert browser.run("return document.activeElement.matches('.card:first-child .remix')")


def test_many_videos_at_once_leave_the_page_able_to_ask(browser: Browser, rig: Rig, studio: Studio) -> None:
    studio.may_go_on.clear()
    for _ in range(7):
        rig.submit(prompt="one of many")
    browser.open(rig.url)
    browser.await_(".card")
    browser.submit(PROMPT)
    browser.await_(".prompt", PROMPT)
    browser.press(".card:first-child .cancel")
    browser.await_(".card:first-child.cancelled")
    studio.may_go_on.set()
    wait_until(lambda: browser.count(".completed") == 7)


def test_what_is_wrong_is_said_where_it_is(browser: Browser, rig: Rig) -> None:
    browser.open(rig.url)
    browser.submit(PROMPT, size="130x112")
    browser.await_("#size-error", "130")
    assert browser.run("return document.activeElement.id") == "size"
    assert browser.find("#size").get_attribute("aria-invalid") == "true"
    browser.submit(PROMPT, size="128x112")
    browser.await_(".queued")
    assert browser.text(".error") == ""
    browser.run("window.fetch = () => Promise.reject(new TypeError('no network'))")
    browser.press(".cancel")
    browser.await_(".why", "The server cannot be reached.")


def test_a_dropped_picture_is_the_first_frame(browser: Browser, rig: Rig, studio: Studio, picture: Path) -> None:
    browser.open(rig.url)
    assert not browser.find("#picture").is_displayed()
    browser.choose("#model", "tiny-i2v")
    browser.submit(PROMPT)
    browser.await_("#input_reference-error", "send one")
    browser.drop("h1", picture.read_bytes())
    browser.await_("#preview")
    browser.press("#submit")
    browser.await_(".completed")
    stored = rig.service.objects.local(jobs(rig)[0].objects[0])
    assert Image.open(stored).tobytes() == Image.open(picture).convert("RGB").tobytes()


@pytest.mark.parametrize(("versus", "words"), [("seed", ["tinywan", "Seed 4"]), ("other", ["other", "Seed 3"])])
def test_two_videos_are_seen_side_by_side(
    browser: Browser, rig: Rig, studio: Studio, versus: str, words: list[str]
) -> None:
    browser.open(rig.url)
    browser.choose("#versus", versus)
    browser.submit(PROMPT, seed="3")
    browser.await_("#compare:enabled")
    browser.press("#compare")
    wait_until(lambda: browser.count("#pair video") == 2)
    captions = browser.text("#pair figcaption")
    assert "Seed 3, tinywan, w8a8" in captions
    assert all(word in captions for word in words)
    browser.press("#compare-play")
    wait_until(lambda: browser.run(IS_PLAYING, "#pair video"))
    assert browser.text("#compare-play") == "Pause both"
    browser.key(Keys.ESCAPE)
    wait_until(lambda: browser.count("#pair video") == 0)
    assert browser.run("return document.activeElement.id") == "compare"


def test_with_a_key_clips_are_fetched_only_when_they_are_wanted(
    browser: Browser, tinywan: Path, tmp_path: Path
) -> None:
    with running(ServeSettings(), [("", tinywan)], tmp_path, keys=True) as rig, open_studio(rig):
        browser.open(rig.url)
        browser.await_("#key-dialog")
        browser.type("#key", rig.store.add_key("ann")[1])
        browser.key(Keys.ENTER)
        wait_until(lambda: browser.count("#model option"))
        browser.submit(PROMPT, seed="3")
        browser.await_(".completed .play")
        wait_until(lambda: browser.run("return document.querySelector('.poster').naturalWidth") == 160)
        assert not any("variant=video" in name for name in browser.run(FETCHED))
        browser.press(".download")
        file = browser.downloads / f"{jobs(rig)[0].id}.mp4"
        wait_until(file.exists)
        assert file.read_bytes() == clip(3)["video"][0]
        browser.press(".play")
        wait_until(lambda: browser.run(IS_PLAYING, ".card video"))
        browser.leave()


def test_a_clip_is_downloaded_under_the_name_of_its_video(browser: Browser, rig: Rig, studio: Studio) -> None:
    video = rig.submit(seed=2)
    browser.open(rig.url)
    browser.press(".download")
    file = browser.downloads / f"{video['id']}.mp4"
    wait_until(file.exists)
    assert file.read_bytes() == clip(2)["video"][0]
