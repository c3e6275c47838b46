"""The page at / in headless Chromium, over a real server: what it shows, sends and never asks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from aquiline.speculation.tree import TreeShape
from tests.server.http_server import Running, serving

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver")
WAIT = 30


class Page:
    """The page in a browser, by the ids of its elements."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def find(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def wait(self, ready: Any) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT, 0.02).until(lambda _: ready())

    def fill(self, name: str, value: str) -> None:
        self.find(name).clear()
        self.find(name).send_keys(value)

    def press(self, *keys: str) -> None:
        """To whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def note(self, answer: int) -> str:
        """Below an answer, once it has ended."""

        def ended() -> str:
            notes = self.all(".note")
            return notes[answer].text if len(notes) > answer else ""

        return self.wait(ended)

    def words(self, answer: int) -> str:
        return self.all(".assistant > span:first-child")[answer].text

    def network(self) -> list[dict[str, Any]]:
        """Every request since the last call."""
        logged = [
            json.loads(one["message"])["message"] for one in self.driver.get_log("performance")
        ]
        sent = [one for one in logged if one["method"] == "Network.requestWillBeSent"]
        return [one["params"]["request"] for one in sent]

    def asked(self) -> list[dict[str, Any]]:
        """The bodies of the chats among them; nothing may have left the host."""
        requests = self.network()
        hosts = {urlsplit(one["url"]).hostname for one in requests if one["url"][:5] != "data:"}
        assert hosts <= {"127.0.0.1"}
        return [json.loads(one["postData"]) for one in requests if "postData" in one]

    def errors(self) -> list[str]:
        """What the console has to complain of."""
        bad = "SEVERE", "WARNING"
        return [one["message"] for one in self.driver.get_log("browser") if one["level"] in bad]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    chromium, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium, "chromium and chromium-driver are not installed"
    options.binary_location = chromium
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: Any, server: Running) -> Page:
    driver.get(server.url + "/")
    page = Page(driver)
    page.wait(lambda: page.find("model").text == "tiny")
    page.network()
    page.errors()
    return page


def test_a_chat_streams_in_coloured_tokens(page: Page, server: Running) -> None:
    page.driver.refresh()  # what loads is looked at, too
    page.wait(lambda: page.find("model").text == "tiny")
    page.fill("max_tokens", "40")
    page.find("prompt").click()
    page.press("abc", "\ue008\ue007\ue008", "d", "\ue007")  # Shift+Enter is a new line, Enter sends
    note = page.note(0)
    (asked,) = page.asked()
    assert asked["messages"] == [{"role": "user", "content": "abc\nd"}]
    assert (asked["stream"], asked["speculation"], asked["max_tokens"]) == (True, True, 40)
    answer = server.post("/v1/chat/completions", {**asked, "stream": False}).json()
    text, stats = answer["choices"][0]["message"]["content"], answer["speculation"]
    assert page.all(".user")[0].text == "abc\nd"
    assert page.words(0).split() == text.split()
    marked = [len(page.all(f".assistant .d{depth}")) for depth in range(4)]
    assert marked[1] > 0
    assert len(page.all(".assistant .d1[title='drafted, accepted at depth 1']")) == marked[1]
    assert sum(marked) <= len(stats["depths"])
    for at in range(1, 4):  # an end token has a depth and no text
        assert stats["depths"].count(at) - 1 <= marked[at] <= stats["depths"].count(at)
    assert f"TPC {stats['tokens_per_call']:.2f}" in note
    assert note.startswith("with speculation")
    assert page.find("tpc").text == f"{stats['tokens_per_call']:.2f}"
    assert page.find("count").text == str(len(stats["depths"]))
    assert page.find("ttit").text.endswith(" ms")
    assert page.find("tree-name").text == "a chain of 3"
    assert len(page.all("#tree circle")) == 4
    assert page.errors() == []


def test_the_switch_and_the_settings_are_sent(page: Page) -> None:
    for name, value in (
        ("temperature", "1.2"), ("seed", "7"), ("max_tokens", "30"), ("system", "be brief")
    ):  # fmt: skip
        page.fill(name, value)
    page.fill("prompt", "hello")
    page.find("send").click()
    page.note(0)
    page.find("speculation").click()
    page.find("again").click()
    note = page.note(1)
    first, second = page.asked()
    assert second == {**first, "speculation": False}
    assert first["messages"][0] == {"role": "system", "content": "be brief"}
    assert (first["temperature"], first["seed"], first["max_tokens"]) == (1.2, 7, 30)
    assert page.words(0) == page.words(1) != ""
    assert note.startswith("without speculation · TPC 1.00")
    assert page.all(".assistant")[0].find_elements("css selector", ".d1")
    assert not page.all(".assistant")[1].find_elements("css selector", ".d1, .d2, .d3")
    assert page.find("tree-name").text.startswith("none")
    assert len(page.all("#tree circle")) == 1
    page.fill("prompt", "more")
    page.press("\ue007")
    page.note(2)
    (third,) = page.asked()
    assert [one["role"] for one in third["messages"]] == ["system", "user", "assistant", "user"]
    page.find("new").click()
    assert page.all(".turn") == []
    assert page.errors() == []


def test_any_tree_is_drawn(page: Page) -> None:
    """Every node once, in a place of its own, below its parent; retrieved ones behind dashes."""
    shape = TreeShape.named("eagle-25").retrieving(4)
    page.driver.execute_script(
        "showTree({paths: arguments[0], retrieved: arguments[1]})", shape.paths, shape.retrieved
    )
    nodes = [
        (float(one.get_attribute("cx")), float(one.get_attribute("cy")))
        for one in page.all("#tree circle")
    ]
    assert len(nodes) == len(set(nodes)) == shape.size
    edges = [
        tuple(float(one.get_attribute(end)) for end in ("x1", "y1", "x2", "y2"))
        for one in page.all("#tree line")
    ]
    expected = [(*nodes[shape.parents[at]], *nodes[at]) for at in range(1, shape.size)]
    assert edges == expected
    assert all(above < below for _, above, _, below in edges)
    assert len(page.all("#tree .found")) == 4
    assert page.find("tree-name").text == "25 nodes, 5 deep, and 4 retrieved"


def test_escape_stops(page: Page, server: Running) -> None:
    page.fill("max_tokens", "1500")
    page.fill("prompt", "abc")
    page.press("\ue007")
    page.wait(lambda: page.all(".assistant .token"))
    assert page.find("stop").is_enabled()
    page.press("\ue00c")
    assert page.note(0).endswith("stopped")
    assert 0 < int(page.find("count").text) < 1500
    page.wait(lambda: server.metric("num_requests_running") == 0)
    assert page.driver.switch_to.active_element.get_attribute("id") == "prompt"
    assert page.find("send").is_enabled()
    assert page.errors() == []


def test_refusals_are_told_in_words(page: Page) -> None:
    page.fill("temperature", "-1")
    page.fill("prompt", "abc")
    page.press("\ue007")
    assert page.note(0).endswith("failed")
    assert "temperature=-1" in page.find("problem").text
    page.fill("temperature", "0")
    page.fill("max_tokens", "5")
    page.fill("prompt", "abc")
    page.press("\ue007")
    page.note(1)
    assert not page.find("problem").is_displayed()


def test_everything_is_reached_by_tab_in_order(page: Page) -> None:
    reached = []
    page.find("prompt").click()
    order = ["prompt", "send", "speculation", "temperature", "max_tokens", "seed", "system"]
    for _ in order:
        reached.append(page.driver.switch_to.active_element.get_attribute("id"))
        page.press("\ue004")
    assert reached == order


def test_a_key_is_asked_for_and_kept(driver: Any, checkpoints: Path, tmp_path: Path) -> None:
    folders = checkpoints / "target", checkpoints / "draft"
    with serving(*folders, tmp_path / "server.log", "--api-key", "secret") as locked:
        driver.get(locked.url + "/")
        page = Page(driver)
        page.wait(page.find("key").is_displayed)
        page.fill("key", "secret")
        page.press("\ue004")
        page.wait(lambda: page.find("model").text == "tiny")
        page.fill("max_tokens", "5")
        page.fill("prompt", "abc")
        page.press("\ue007")
        assert page.note(0).startswith("with speculation")
        driver.refresh()
        page.wait(lambda: page.find("model").text == "tiny")
        assert driver.execute_script("return localStorage.length") == 0
