"""The page in headless Chromium, from the disk: no error, no request, and the keys do what the help says.

Needs Chromium and its driver on the PATH, and the extra `browser`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from probekit.reports.lens import page
from probekit.reports.lens_reading import LensData, read_text
from probekit.reports.pages import symbols
from probekit.run.run import Run

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed: pip install '.[browser]'"
)
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not on the PATH"
)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,900",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["webdriver.Chrome"]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def data(probed_run: Run) -> LensData:
    # Words that the encoder knows: of others, no action is shown as true.
    begins, ends = probed_run.corpus.sentence_texts([0, 1])
    text = f"Noni <script>alert(1)</script> mumi. {begins.strip()} Moru\n\n{ends.strip()[:-1]}"
    return read_text(probed_run, text, ["soft"])


@pytest.fixture
def opened(browser: "webdriver.Chrome", data: LensData, tmp_path: Path) -> "webdriver.Chrome":
    """The page, and nothing logged yet."""
    load(browser, page(data), tmp_path)
    return browser


def load(browser: "webdriver.Chrome", written: str, folder: Path) -> None:
    path = folder / "lens.html"
    path.write_text(written, "utf-8")
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())


def text_of(browser: "webdriver.Chrome", selector: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, selector).get_property("textContent")


def heading(browser: "webdriver.Chrome") -> str:
    return text_of(browser, "#panel h2")


def token(browser: "webdriver.Chrome", number: int) -> "webdriver.remote.webelement.WebElement":
    return browser.find_elements(By.CSS_SELECTOR, "#text .t")[number]


def press(browser: "webdriver.Chrome", *keys: str) -> None:
    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def focused(browser: "webdriver.Chrome") -> int:
    script = "return [...document.querySelectorAll('#text .t')].indexOf(document.activeElement)"
    return browser.execute_script(script)


def choose(browser: "webdriver.Chrome", name: str, value: str) -> None:
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
    browser.execute_script(f"{script} e.dispatchEvent(new Event('change'))", name, value)


def requests(browser: "webdriver.Chrome") -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def test_no_error_and_no_request_but_for_the_page(opened: "webdriver.Chrome"):
    press(opened, Keys.TAB, Keys.ARROW_RIGHT, "]")
    assert [url.rpartition("/")[2] for url in requests(opened)] == ["lens.html"]
    assert opened.get_log("browser") == []
    blocked = "return fetch('http://127.0.0.1:1/').then(() => 'sent', () => 'refused')"
    assert opened.execute_script(blocked) == "refused"
    assert "Content Security Policy" in opened.get_log("browser")[0]["message"]


def test_arrows_walk_and_the_details_follow(opened: "webdriver.Chrome", data: LensData):
    second, last = int(data.first_token[1]), len(data.pieces) - 1
    opened.execute_script("document.querySelector('#text .t').focus()")
    walk = [
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_LEFT, 0),
        (Keys.ARROW_LEFT, 0),
        (Keys.ARROW_DOWN, second),
        (Keys.ARROW_RIGHT, second + 1),
        (Keys.ARROW_UP, 0),
        (Keys.END, last),
        (Keys.ARROW_RIGHT, last),
        (Keys.HOME, 0),
    ]
    for key, there in walk:
        press(opened, key)
        assert focused(opened) == there
        assert f": token {there + 1} of {last + 1}," in heading(opened)
        stops = opened.find_elements(By.CSS_SELECTOR, "#text [tabindex='0']")
        assert stops == [token(opened, there)]


def test_enter_pins_and_escape_unpins(opened: "webdriver.Chrome"):
    opened.execute_script("document.querySelector('#text .t').focus()")
    press(opened, Keys.ENTER, Keys.ARROW_RIGHT)
    assert focused(opened) == 1
    assert heading(opened).endswith(": token 1 of " + heading(opened).rpartition(" of ")[2])
    assert "(pinned)" in heading(opened)
    assert token(opened, 0).get_attribute("aria-selected") == "true"
    press(opened, Keys.ESCAPE)
    assert "token 2 of" in heading(opened)
    assert opened.find_elements(By.CSS_SELECTOR, "[aria-selected='true']") == []


def test_hovering_shows_and_clicking_pins(opened: "webdriver.Chrome"):
    ActionChains(opened).move_to_element(token(opened, 3)).pause(0.2).perform()
    assert "token 4 of" in heading(opened)
    ActionChains(opened).click().move_to_element(token(opened, 5)).pause(0.2).perform()
    assert "token 4 of" in heading(opened)
    assert "(pinned)" in heading(opened)


def test_what_is_shown_is_what_was_read(opened: "webdriver.Chrome", data: LensData):
    """Every cell of the heat map, in words and colours, at a token that a sentence follows."""
    t, distances, (reading,) = int(data.first_token[1]) - 1, data.probes.positions, data.readings
    action = int(data.truth.of_sentences[1])
    opened.execute_script("document.querySelectorAll('#text .t')[arguments[0]].focus()", t)
    points = [n for n, point in enumerate(data.probes.points) if point[0] == "hook_resid_post"]
    choose(opened, "location", "hook_resid_post")
    cells = opened.execute_script(
        "return [...document.querySelectorAll('.map td[data-position]')]"
        ".map((box) => [box.firstChild.data, box.lastChild.textContent])"
    )
    order = [(point, d) for point in reversed(points) for d in range(len(distances))]
    assert len(cells) == len(order)
    for (shown, below), (point, d) in zip(cells, order, strict=True):
        cell = point * len(distances) + d
        value = 100 * reading.of_true[cell, t]
        assert shown == ("<0.1 %" if value < 0.05 else f"{value:.{1 if value < 10 else 0}f} %")
        marks = below.split()
        assert int(marks[0]) == reading.top[0, cell, t]
        assert ("✓" in marks) == (int(marks[0]) == data.truth.labels[d, t])
        # The last token before a sentence carries that sentence's plan.
        assert ("†" in marks) == reading.conditioning["changed"][point]
    assert f"action {action}" in text_of(opened, "#panel")
    words = opened.execute_script(
        "return [...document.querySelectorAll('.map .word span')].map((span) => span.textContent)"
    )
    following = reading.next["tokens"][::-1, :, t].ravel()
    assert words == [symbols(data.words[token]) for token in following]


def test_underlined_tokens_are_where_the_probe_was_fitted(opened: "webdriver.Chrome", data: LensData):
    def underlined() -> list[int]:
        return opened.execute_script(
            "return [...document.querySelectorAll('#text .t')]"
            ".flatMap((token, i) => token.matches('.fit') ? [i] : [])"
        )

    begins = data.first_token[1:]
    for distance in data.probes.positions:
        choose(opened, "position", str(distance))
        assert underlined() == sorted(t for t in begins - distance if t >= 0)
    choose(opened, "position", "own")
    expected = sorted({t for begin in begins for t in begin - np.array(data.probes.positions) if t >= 0})
    assert underlined() == expected
    blank = opened.execute_script("return document.querySelectorAll('#text .t.blank').length")
    assert blank == len(data.pieces) - len(expected)


def test_brackets_change_the_layer(opened: "webdriver.Chrome"):
    choose(opened, "location", "hook_resid_post")
    choose(opened, "layer", "1")
    before = text_of(opened, "#trust")
    for key, layer in (("]", 2), ("]", 2), ("[", 1), ("[", 0), ("[", 0)):
        press(opened, key)
        assert opened.find_element(By.ID, "layer").get_property("value") == str(layer)
        assert f"layer {layer}, position" in text_of(opened, "#panel")
    assert text_of(opened, "#trust") != before


def test_help_opens_and_closes(opened: "webdriver.Chrome"):
    press(opened, "?")
    assert opened.find_element(By.ID, "help").is_displayed()
    press(opened, Keys.ESCAPE)
    assert not opened.find_element(By.ID, "help").is_displayed()


def test_colours_are_readable_in_light_and_dark(opened: "webdriver.Chrome"):
    """Text against its background: 4.5 to 1, as WCAG has it, for every token and for the page itself."""
    contrast = """
      const lum = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
      return [...document.querySelectorAll(arguments[0])].map((e) => {
        const style = getComputedStyle(e), a = lum(style.color);
        const b = lum(style.backgroundColor.startsWith("rgba(0, 0, 0, 0)")
          ? getComputedStyle(document.body).backgroundColor : style.backgroundColor);
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      })"""
    backs = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        for selector in ("#text .t", "body", ".note", ".n", ".e", "dt", ".map td"):
            ratios = opened.execute_script(contrast, selector)
            assert ratios
            assert min(ratios) >= 4.5, (scheme, selector)
        backs.append(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))
    opened.find_element(By.ID, "theme").click()
    backs.append(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert backs[0] == backs[2] != backs[1]


def test_two_variants_side_by_side(browser: "webdriver.Chrome", probed_run: Run, tmp_path: Path):
    """The second column has the text again, is painted by its own numbers, and shows the difference."""
    data = read_text(probed_run, "Noni mumi. Rata noni.", ["none", "soft"])
    load(browser, page(data), tmp_path)
    choose(browser, "location", "hook_resid_post")  # the embedding is not conditioned
    choose(browser, "layer", "2")
    columns = "#text .x:not(.second) .t", "#text .second .t"
    texts, colours = (
        [
            browser.execute_script(
                "return [...document.querySelectorAll(arguments[0])].map((token) => eval(arguments[1]))",
                column,
                what,
            )
            for column in columns
        ]
        for what in ("token.textContent", "getComputedStyle(token).backgroundColor")
    )
    assert texts[0] == texts[1]
    assert colours[0] != colours[1]
    assert "none, " in text_of(browser, "#trust")
    assert "soft, " in text_of(browser, "#trust")
    browser.find_element(By.ID, "difference").click()
    assert "Second column: from −" in text_of(browser, "#apart")
    assert "soft less none" in text_of(browser, "#panel")
    assert browser.get_log("browser") == []
