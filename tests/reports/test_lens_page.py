"""The page: nothing that a text or corpus holds is ever markup, and nothing is fetched."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from probekit.data.corpus import SPLITS
from probekit.reports.lens import NOTHING, page
from probekit.reports.lens_reading import LensData, read_text
from probekit.reports.lens_text import visible
from probekit.run.run import Run

EVIL = "<script>alert(1)</script> </script><img onerror=alert(2)> & \"'\u2028\u2029\x00\u202e <!-- ]]>"


class Parsed(HTMLParser):
    """Elements and texts of a page as a browser's parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict]] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.tokens: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag in ("script", "style", "span"):
            self.open.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag == "span" and dict(attrs).get("role") == "option":
            self.tokens.append("")

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1][0] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1][1].get("role") == "option":
            self.tokens[-1] += data


@pytest.fixture(scope="module")
def evil(probed_run: Run) -> LensData:
    """A text, training sentences and facts that would be markup if they could."""
    data = read_text(probed_run, f"{EVIL} Noni noni. \U0001f469\u200d\U0001f467 Mumi", "soft")
    examples = {action: [EVIL] for action in data.examples}
    return replace(data, examples=examples, facts=data.facts | {"Run": EVIL}, language='"><script>')


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2")


def test_whatever_is_shown_is_text(evil: LensData):
    written = page(evil)
    parsed = Parsed(written)
    assert parsed.tags.count("script") == 2
    assert not {"img", "a", "link", "iframe", "base", "object"} & set(parsed.tags)
    assert not {"src", "href", "onerror", "action", "srcset"} & parsed.attributes
    assert [shown for shown in parsed.tokens if shown != "·"] == [visible(p) for p in evil.pieces if p]
    assert len(parsed.tokens) == len(evil.pieces)
    assert "alert(1)" not in parsed.scripts[1]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", written)


def test_embedded_json_ends_nothing_and_says_the_same(evil: LensData):
    raw, _ = Parsed(page(evil)).scripts
    assert not set("<>&\u2028\u2029") & set(raw)
    data = json.loads(raw)
    assert data["examples"] == {str(action): [visible(EVIL)] for action in evil.examples}
    assert data["first"] == evil.first_token.tolist()
    assert data["told"]["carried"] == evil.told.carried.tolist()


def test_numbers_survive_the_packing(evil: LensData):
    data = json.loads(Parsed(page(evil)).scripts[0])
    np.testing.assert_array_equal(unpacked(data["top"]), evil.top.ravel())
    np.testing.assert_allclose(
        unpacked(data["read"]) / (NOTHING - 1), evil.probability.ravel(), atol=0.6 / NOTHING
    )
    right, true = unpacked(data["right"]), evil.true_probability.ravel()
    np.testing.assert_array_equal(right == NOTHING, np.isnan(true))
    known = ~np.isnan(true)
    assert known.any()
    assert not known.all()
    np.testing.assert_allclose(right[known] / (NOTHING - 1), true[known], atol=0.6 / NOTHING)


def test_one_file_that_fetches_nothing(probed_run: Run, text: str):
    written = page(read_text(probed_run, text))
    for reference in ("http:", "https:", "src=", "href=", "url(", "@import", "fetch(", "innerHTML"):
        assert reference not in written
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in written
    for named in (
        "tiny",
        "none",
        "new GPT-2, 3 layers of width 32",
        "planted (160 documents)",
        "fitted on 32",
    ):
        assert named in written


def test_the_page_says_where_true_actions_come_from(probed_run: Run, document: int, text: str):
    split = SPLITS[probed_run.corpus.split[document]]
    own = f"The text is document {document:,} of the corpus, of the split &#x27;{split}&#x27;"
    nearest = "true action is the one whose centre is nearest to it"
    of_corpus, other = (page(read_text(probed_run, given)) for given in (text, f"{text} And more."))
    assert own in of_corpus
    assert nearest not in of_corpus
    assert nearest in other
    assert own not in other


def test_the_same_text_gives_the_same_page(probed_run: Run, text: str):
    first, again = (page(read_text(Run.open(probed_run.folder), text, "soft")) for _ in range(2))
    assert first == again


def test_an_interval_that_does_not_exist_is_null(evil: LensData):
    quality = replace(evil.probes.quality[0], accuracy=(0.5, float("nan"), float("nan")))
    probes = replace(evil.probes, quality=[quality] * len(evil.probes.quality))
    data = json.loads(Parsed(page(replace(evil, probes=probes))).scripts[0])
    assert data["quality"][0] == [[0.5, None, None], quality.documents, quality.examples, quality.injected]
