"""Headless Chromium, as a person uses it."""

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.processes import wait_until

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"),
    "--disable-features=BackForwardCache",  # it keeps the connections of pages that were left
)
SECONDS = 15.0
IS_OPEN = "return document.querySelector('#model option, #key-dialog[open]') !== null"
IS_SHOWN = """
const [selector, words] = arguments;
const isIt = (each) => each.checkVisibility() && each.textContent.includes(words);
return [...document.querySelectorAll(selector)].some(isIt);
"""
DROP = """
const [selector, encoded, name] = arguments;
const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
const dataTransfer = new DataTransfer();
dataTransfer.items.add(new File([bytes], name, { type: "image/png" }));
const options = { dataTransfer, bubbles: true, cancelable: true };
const leaves = (kind) => document.querySelector(selector).dispatchEvent(new DragEvent(kind, options));
if (["dragover", "drop"].some(leaves)) throw new Error("the browser would open the picture in place of the page");
"""


class Browser:
    """A window with the page.

    Args:
        driver: Selenium's.
        downloads: The folder of downloads.
    """

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})

    def open(self, url: str, width_px: int = 1280, height_px: int = 900, scheme: str = "light") -> None:
        """Open the page in a window of some size, and wait until it knows the models, or asks for a key."""
        size = {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": width_px < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(url)
        wait_until(lambda: self.run(IS_OPEN), SECONDS)

    def leave(self) -> None:
        """Close the page, which ends its requests."""
        self.driver.get("about:blank")

    def run(self, script: str, *arguments: object) -> Any:
        """Run JavaScript in the page."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The text of all elements that are shown."""
        found = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return "\n".join(each.text for each in found if each.is_displayed())

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def await_(self, selector: str, words: str = "") -> None:
        """Wait until an element is shown, and some words in it."""
        try:
            wait_until(lambda: self.run(IS_SHOWN, selector, words), SECONDS)
        except AssertionError:
            raise AssertionError(f"no {selector} with {words!r}: {self.text('body')}") from None

    def press(self, selector: str) -> None:
        """Click an element, once it can be."""
        self.await_(selector)
        self.find(selector).click()

    def type(self, selector: str, text: str) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a list."""
        self.find(f'{selector} option[value="{value}"]').click()

    def key(self, *keys: str) -> None:
        """Press keys, all at once."""
        actions = ActionChains(self.driver, duration=0)
        for key in keys:
            actions.key_down(key)
        for key in reversed(keys):
            actions.key_up(key)
        actions.perform()

    def tab_to(self, selector: str, most: int = 40) -> None:
        """Press Tab until an element has the focus."""
        for _ in range(most):
            if self.run("return document.activeElement.matches(arguments[0])", selector):
                return
            self.key(Keys.TAB)
        raise AssertionError(f"Tab does not lead to {selector}")

    def submit(self, prompt: str, **fields: str) -> None:
        """Fill in the form and send it."""
        self.type("#prompt", prompt)
        for name, value in fields.items():
            self.type(f"#{name}", value)
        self.press("#submit")

    def drop(self, selector: str, picture: bytes) -> None:
        """Drop a picture on an element."""
        self.run(DROP, selector, base64.b64encode(picture).decode(), "picture.png")

    def complaints(self) -> list[str]:
        """What the browser has logged since the last call: errors of scripts, and what the page's policy forbids."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["source"] != "network"]


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Start a browser."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium or its driver is not installed (Debian's packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER, env={**os.environ, "HOME": str(folder)})
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(driver, folder / "downloads")
    finally:
        driver.quit()
