"""Metrics of generated text on the terminal: every number in its place."""

import re

import numpy as np
import pandas as pd
from read_tables import HOSTILE, rows_of, with_range

from probekit.generation.evaluate import GenerationEvaluation
from probekit.reports.terminal import print_generation


def generated(**changes) -> GenerationEvaluation:
    """Two lengths and two variants, one of them planned, of two seeds."""
    value = iter(np.linspace(0.1, 0.9, 40))
    rows = []
    for variant, seeds in (("other document", 1), ("soft", 2)):
        for texts, length, metric in (
            ("continuations", 1200, "rouge2"),
            ("continuations", 8, "levenshtein"),
            ("samples", 1200, "mauve"),
            ("continuations", 1200, "plan_following"),
        ):
            if variant == "soft" or metric in ("rouge2", "levenshtein"):
                keys = {"variant": variant, "actions": "planner", "texts": texts, "length": length}
                low, middle, high = (next(value) for _ in range(3))
                spread = np.nan if seeds == 1 else 0.25
                rows.append(
                    keys
                    | {"metric": metric, "value": middle, "value_low": low, "value_high": high}
                    | {"seed_spread": spread, "seeds": seeds, "documents": 50, "empty": 0}
                )
    table = pd.DataFrame(rows).assign(**changes)
    return GenerationEvaluation(table, pd.DataFrame(), {"prompts": 50}, [f"note {HOSTILE}"])


def test_generation(capsys):
    evaluation = generated()
    print_generation(evaluation)
    printed = capsys.readouterr().out
    for title in ("continuations of 1,200 tokens", "continuations of 8 tokens", "samples of 1,200 tokens"):
        assert f"Generated {title}" in printed
    rows = rows_of(printed)
    for row in evaluation.metrics.itertuples():
        cells = [r for r in rows if r[0] == row.variant]
        assert any(with_range(row, "value") in cell for cell in cells)
    assert sum("spread over seeds 0.250" in row for row in rows) == 4
    assert f"note {HOSTILE}\n" in printed
    assert "nan" not in printed.lower()
    assert "Blank among these" not in printed
    assert "too narrow" not in printed


def test_generation_that_went_wrong(capsys):
    print_generation(generated(empty=3, value=np.nan, value_low=np.nan, value_high=np.nan))
    printed = capsys.readouterr().out
    # By kind and length of texts: two variants' continuations, one's samples.
    assert re.findall("Blank among these: ([0-9]+);", printed) == ["6", "6", "3"]
    assert "nan" not in printed.lower()
