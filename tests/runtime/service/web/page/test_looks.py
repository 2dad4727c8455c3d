"""How the page looks, from a phone to a wide screen, light and dark, and what those who do not see it are told."""

import time
from typing import Any

import pytest

from tests.processes import wait_until
from tests.runtime.service.served import Rig
from tests.runtime.service.web.page.browser import Browser
from tests.runtime.service.web.page.studio import Studio

pytestmark = pytest.mark.slow

CONTROLS = "a[href], button, input, select, textarea, video"
CUT_OFF = """
const width = document.documentElement.clientWidth, found = [];
if (document.documentElement.scrollWidth > width) found.push(`the page is ${document.documentElement.scrollWidth} wide`);
for (const each of document.querySelectorAll(arguments[0])) {
  const box = each.getBoundingClientRect();
  if (!each.checkVisibility() || each.matches(".skip")) continue;
  if (box.left < 0 || box.right > width || each.scrollWidth > each.clientWidth + 1 && each.matches("button, a, select"))
    found.push(`${each.outerHTML.slice(0, 80)} from ${box.left} to ${box.right}`);
  if (!each.matches("[type=checkbox]") && box.height < 24) found.push(`${each.outerHTML.slice(0, 80)} is too small to touch`);
}
return found;
"""
OVERLAPS = """
const boxes = [...document.querySelectorAll(arguments[0])].filter((each) => each.checkVisibility() && !each.matches(".skip"));
const found = [];
for (const [place, one] of boxes.entries()) for (const other of boxes.slice(place + 1)) {
  const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
  if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
    found.push(`${one.outerHTML.slice(0, 60)} over ${other.outerHTML.slice(0, 60)}`);
}
return found;
"""
PALE = """
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => {
  const [r, g, b] = parts(colour).slice(0, 3).map((part) => part / 255).map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const groundOf = (each) => {
  for (let at = each; at; at = at.parentElement) {
    const [, , , alpha = 1] = parts(getComputedStyle(at).backgroundColor);
    if (alpha === 1) return getComputedStyle(at).backgroundColor;
  }
};
const found = [];
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const each = texts.currentNode.parentElement;
  if (!texts.currentNode.data.trim() || !each.checkVisibility() || each.matches(":disabled, option, script, noscript")) continue;
  const [a, b] = [light(getComputedStyle(each).color), light(groundOf(each))].sort((x, y) => y - x);
  const contrast = (a + 0.05) / (b + 0.05);
  if (contrast < 4.5) found.push(`${texts.currentNode.data.trim()}: ${contrast.toFixed(2)}`);
}
return found;
"""


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
        found: list[Any] = [browser.run(script, CONTROLS) for script in (CUT_OFF, OVERLAPS, PALE)]
        browser.run("document.getElementById('key-button').click()")
        found.extend(browser.run(script, f"dialog :is({CONTROLS})") for script in (CUT_OFF, OVERLAPS))
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
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node.get("ignored", False)
    ]
    roles = {"button", "link", "textbox", "combobox", "spinbutton", "checkbox", "progressbar", "menuitem", "img", "image"}
    named = [(role, name) for role, name in nodes if role in roles]
    assert not [role for role, name in named if not name.strip()]
    assert {"button", "link", "textbox", "combobox", "spinbutton", "checkbox", "progressbar"} <= {r for r, _ in named}
    cancelling = [name for _, name in named if name.startswith("Cancel")]
    assert cancelling == ["Cancel: waits"] * 2
    landmarks = {role for role, _ in nodes}
    assert {"banner", "main", "region", "list", "status", "heading"} <= landmarks
    assert browser.run("return document.documentElement.lang") == "en"
    assert browser.run("return [...document.querySelectorAll('[id]')].length === new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size")
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
