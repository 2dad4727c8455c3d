"""How the page looks, from a phone to a wide screen, light and dark, and what those who do not see it are told."""

import time
from pathlib import Path

import pytest

from tests.processes import wait_until
from tests.runtime.service.served import Rig
from tests.runtime.service.web.page.browser import Browser
from tests.runtime.service.web.page.studio import Studio

pytestmark = pytest.mark.slow

CONTROLS = "a[href], button, input, select, textarea, video"
SCRIPTS = (Path(__file__).parent / "looks.js").read_text()


def wrong(browser: Browser, look: str, controls: str = CONTROLS) -> list[str]:
    """What a function of looks.js finds."""
    found: list[str] = browser.run(f"{SCRIPTS}\nreturn {look}(arguments[0]);", controls)
    return found


@pytest.fixture
def filled(rig: Rig, studio: Studio) -> Rig:
    """A server with a video in every state, and prompts that are hard to lay out."""
    made = [rig.submit(prompt=prompt)["id"] for prompt in ("a red circle", "w" * 60, "broken")]
    wait_until(lambda: all(rig.store.get(job).state.is_terminal for job in made))  # type: ignore[union-attr]
    studio.may_go_on.clear()
    rig.store.cancel(rig.submit(prompt="not wanted")["id"])
    for _ in range(2):
        rig.submit(prompt="waits")
    return rig


def test_nothing_is_cut_off_pale_or_hidden_at_any_width(browser: Browser, filled: Rig) -> None:
    for width, scheme in ((360, "light"), (800, "dark"), (1600, "light"), (360, "dark"), (2560, "dark")):
        browser.open(filled.url, width, 800, scheme)
        browser.await_(".failed")
        browser.await_(".in_progress")
        browser.choose("#model", "tiny-i2v")
        wait_until(lambda: not browser.run("return document.getAnimations().length"))
        found = [wrong(browser, look) for look in ("cutOff", "overlaps", "pale")]
        browser.run("document.getElementById('key-button').click()")
        found += [wrong(browser, look, f"dialog :is({CONTROLS})") for look in ("cutOff", "overlaps")]
        assert found == [[]] * len(found), (width, scheme)


def test_the_form_can_be_reached_whole_in_a_low_window(browser: Browser, filled: Rig) -> None:
    browser.open(filled.url, 1280, 400)
    browser.await_(".in_progress")
    browser.choose("#model", "tiny-i2v")
    browser.run("window.scrollTo(0, 300); document.getElementById('submit').scrollIntoView({ block: 'nearest' })")
    time.sleep(0.1)
    box = browser.run("return document.getElementById('submit').getBoundingClientRect().toJSON()")
    assert box["top"] >= 0
    assert box["bottom"] <= 400


def test_every_control_has_a_name_of_its_own_and_news_are_told(browser: Browser, filled: Rig, studio: Studio) -> None:
    browser.open(filled.url)
    browser.await_(".in_progress")
    browser.choose("#model", "tiny-i2v")
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node.get("ignored", False)
    ]
    roles = {
        "button",
        "link",
        "textbox",
        "combobox",
        "spinbutton",
        "checkbox",
        "progressbar",
        "menuitem",
        "img",
        "image",
    }
    named = [(role, name) for role, name in nodes if role in roles]
    assert not [role for role, name in named if not name.strip()]
    assert {"button", "link", "textbox", "combobox", "spinbutton", "checkbox", "progressbar"} <= {r for r, _ in named}
    cancelling = [name for _, name in named if name.startswith("Cancel")]
    assert cancelling == ["Cancel: waits"] * 2
    landmarks = {role for role, _ in nodes}
    assert {"banner", "main", "region", "list", "status", "heading"} <= landmarks
    assert browser.run("return document.documentElement.lang") == "en"
    assert wrong(browser, "sharedIds") == []
    studio.may_go_on.set()
    wait_until(lambda: browser.run("return document.getElementById('news').textContent") == "Done: waits")


def test_the_focus_can_be_seen_wherever_it_is(browser: Browser, filled: Rig) -> None:
    browser.open(filled.url)
    browser.await_(".in_progress")
    seen = set()
    for _ in range(60):
        browser.key("\ue004")
        place = browser.run(
            "const at = document.activeElement, style = getComputedStyle(at);"
            "return [at.id || at.className || at.tagName, style.outlineStyle, parseFloat(style.outlineWidth)]"
        )
        if place[0] == "BODY":
            break
        seen.add(place[0])
        assert place[1] != "none", place
        assert place[2] >= 2, place
    assert {"skip", "prompt", "submit", "play", "download", "cancel", "retry", "remix", "delete"} <= seen
