"""The table of claims says what the figures' numbers say."""

import re

import claims
import pandas as pd
import pytest

from probekit.errors import ProbekitError


@pytest.mark.parametrize(
    ("low", "high", "side", "documents", "expected"),
    [
        (-2.0, -1.0, "below", 600, "holds"),
        (-2.0, -1.0, "above", 600, "does not hold"),
        (1.0, 2.0, "above", 600, "holds"),
        (1.0, 2.0, "below", 600, "does not hold"),
        (-1.0, 1.0, "below", 600, "cannot be told"),
        (0.0, 1.0, "above", 600, "cannot be told"),
        (1.0, 2.0, "above", 9, "cannot be told"),
    ],
)
def test_an_interval_on_one_side_decides(
    low: float, high: float, side: claims.Side, documents: int, expected: str
):
    assert claims.verdict(low, high, side, documents) == expected


def test_the_page_and_the_table_are_those_of_the_figures():
    table = pd.DataFrame([part.read(claims.FIGURES) for part in claims.evidence()])
    assert (claims.FIGURES / "claims.csv").read_text("utf-8") == table.to_csv(index=False)
    assert claims.PAGE.read_text("utf-8") == claims.page(table)
    counts = [table.verdict.value_counts()[name] for name in ("holds", "does not hold", "cannot be told")]
    readme = " ".join((claims.FIGURES.parent / "README.md").read_text("utf-8").split())
    told = "of {} numbers, {} hold, {} do not hold, {} cannot be told"
    assert told.format(len(table), *counts) in readme
    assert set(claims.COMMANDS) == {*table.figure}
    assert set(claims.CORPORA) == {*table.corpus}
    assert (table.low <= table.value).all()
    assert (table.value <= table.high).all()


def test_commands_are_those_of_the_makefile():
    """But for the folder of the runs, which may be any."""
    makefile = (claims.FIGURES.parent / "Makefile").read_text("utf-8").replace("\\\n", " ")
    makefile = re.sub(r"\$\((\w+)\)", r"\1", makefile.replace("$(firstword $(LMS))", "LM"))
    lines = {" ".join(line.split()) for line in makefile.replace("$(RUNS)", "RUNS").splitlines()}
    known = {re.sub(r" --runs \S+", "", line).removeprefix("DRAW/") for line in lines}
    assert {*claims.COMMANDS.values()} <= known


def test_a_row_that_is_not_there_is_missed():
    part = claims.Evidence("", "2410.12492", "planted", "table1_perplexity", {"first": "nobody"}, "", "below")
    with pytest.raises(ProbekitError, match="has 0 rows"):
        part.read(claims.FIGURES)
