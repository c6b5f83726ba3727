"""`probekit.attribute`: the run's own probes, planted dependences, the page, and what it refuses."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import probekit
from probekit.cli import main
from probekit.errors import ProbekitError
from probekit.probing.probe import probe
from probekit.reports.attribution import Attribution, attribute
from probekit.reports.lens_reading import read_text
from probekit.run.run import Run

AT = 9
"""The token that is read."""
EVIL = "<script>1</script><img>&"


@pytest.fixture(scope="module")
def both(tiny_run: Run, quick_probes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny LM and random weights, with probes of which token is read (0), and which before it (-1)."""
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("attribution") / "run"))
    own = {
        "probe.variants": ["none", "random"],
        "probe.target": "token",
        "probe.anchors": "token",
        "probe.positions": [-1, 0],
        "probe.locations": ["hook_embed", "hook_resid_post"],
        "probe.layers": [2],
        "probe.solvers": ["ridge"],
    }
    probe(run, quick_probes | own, quiet=True)
    return Run.open(run.folder)


@pytest.fixture(scope="module")
def text(both: Run) -> str:
    """The beginning of a test document."""
    return str(both.corpus.texts[int(both.corpus.documents("test")[0])].text)[:120]


@pytest.fixture(scope="module")
def found(both: Run, text: str) -> Attribution:
    """What contributes to a reading inside the LM."""
    return attribute(both, text, AT, location="hook_resid_post", position=-1, quiet=True)


def test_the_score_is_what_the_lens_reads(both: Run, text: str, found: Attribution):
    (reading,) = read_text(both, text, locations=["hook_resid_post"]).readings
    cell = [-1, 0].index(-1)
    row = found.readings.iloc[0]
    np.testing.assert_allclose(np.exp(row.score), reading.read[0, cell, AT], rtol=1e-4)
    name = reading.probes.classes[int(reading.top[0, cell, AT])]
    assert row.score_of == f"log-probability of {name}"
    assert list(found.readings.variant) == ["none", "random"]
    assert found.readings.score_of.nunique() == 1  # random weights are asked for the same class


def test_contributions_add_up(found: Attribution):
    sums = found.table.groupby("variant").integrated_gradient.sum()
    for row in found.readings.itertuples():
        assert abs(sums[row.variant] - (row.score - row.baseline)) < 1e-3
        np.testing.assert_allclose(row.gap, abs(sums[row.variant] - (row.score - row.baseline)), atol=1e-5)
    assert found.table.token.tolist() == [*range(AT + 1)] * 2
    assert found.table.distance.tolist() == [*range(AT, -1, -1)] * 2


def test_a_reading_of_the_embedding_depends_on_its_own_token_alone(both: Run, text: str):
    table = attribute(both, text, AT, location="hook_embed", position=0, quiet=True).table
    earlier, own = table[table.distance > 0], table[table.distance == 0]
    np.testing.assert_allclose(earlier[["integrated_gradient", "occlusion"]], 0, atol=1e-6)
    assert (own[["integrated_gradient", "occlusion"]] > 0.1).all(axis=None)


def test_a_probe_of_the_token_that_is_read_points_at_it(both: Run, text: str):
    """Inside the LM, too, where earlier tokens could be read."""
    of = {"location": "hook_resid_post", "position": 0, "variant": "none", "quiet": True}
    tables = [attribute(both, text, at, **of).table for at in range(6, 14)]
    for method in ("integrated_gradient", "occlusion"):
        assert [table.distance[table[method].idxmax()] for table in tables].count(0) >= 7


def test_the_lens_shows_it_by_the_command(both: Run, text: str, tmp_path: Path):
    out = tmp_path / "lens.html"
    words = ["lens", str(both.folder), "--text", text, "-o", str(out), "--quiet"]
    assert main([*words, "--attribute", "9"]) == 0
    with_panel = out.read_text("utf-8")
    assert "reading of token 9" in with_panel
    assert with_panel.count('<section class="attribution">') == 2
    assert main(words) == 0
    assert "attribution" not in out.read_text("utf-8")
    assert main([*words, "--attribute", "99"]) == 2


def test_a_word_names_its_last_token(both: Run):
    table = attribute(both, "One two three. Four.", "three", quiet=True).table
    none = table[table.variant == "none"]
    assert "".join(none.piece).rstrip(".").endswith("three")


def test_no_text_is_markup(both: Run, tmp_path):
    page = attribute(both, f"Noni {EVIL} mumi.", -1, quiet=True)
    html = page.save(tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in html
    assert "<img" not in html
    shown = "".join(re.findall(r'<span class="(?:plus|minus).*?>(.*?)</span>', html))
    assert "&lt;" in shown
    assert page.table.piece.str.cat().startswith("Noni <script>")
    assert "srcdoc" in page._repr_html_()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"token": 99}, r"token is 99, but the text has \d+ tokens; give a number from 0 to"),
        ({"token": "absent"}, "token is 'absent', which is not once in the text"),
        ({"layer": 7}, "--layers has 7, where no probe reads"),
        ({"position": 3}, "position is 3, where no probe reads; there are -1, 0"),
        ({"variant": "soft"}, "variant is 'soft'; contributions are of the text alone: give none or random"),
        ({"steps": 0}, "steps is 0; give how often the gradient is taken"),
        ({"text": "Noni. " * 60}, r"token \d+ is beyond the first window of 48 tokens"),
    ],
)
def test_what_is_refused(both: Run, given: dict[str, Any], said: str):
    with pytest.raises(ProbekitError, match=said) as refused:
        attribute(both, **{"text": "Noni noni. Mumi.", "quiet": True} | given)
    assert "\n" not in str(refused.value)


def test_a_run_without_linear_probes_is_refused(tiny_run: Run):
    with pytest.raises(ProbekitError, match="keeps no linear probes; run `probekit probe"):
        probekit.attribute(tiny_run, "Noni noni.", quiet=True)
