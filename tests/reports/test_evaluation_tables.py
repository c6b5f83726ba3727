"""Evaluations on the terminal: every number in its place."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from read_tables import rows_of

from probekit.evaluation.evaluate import evaluate
from probekit.evaluation.perplexity import Evaluation
from probekit.reports.terminal import print_evaluation
from probekit.run.run import Run


@pytest.fixture(scope="module")
def evaluation(tiny_run: Run, tmp_path_factory) -> Evaluation:
    folder = shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("reported") / "run")
    return evaluate(folder, quiet=True)


def test_evaluation(evaluation: Evaluation, capsys):
    print_evaluation(evaluation)
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert f"{evaluation.perplexity.tokens.iloc[0]:,} tokens" in printed
    for row in evaluation.perplexity.itertuples():
        interval = f"[{row.perplexity_low:.3f}, {row.perplexity_high:.3f}]"
        assert [row.variant, row.actions, f"{row.perplexity:.3f}", interval] in rows
    for row in evaluation.differences.itertuples():
        interval = f"[{row.difference_low:.3f}, {row.difference_high:.3f}]"
        assert [row.first, row.second, f"{row.difference:+.3f}", interval] in rows
    for reader in evaluation.planner.reader.unique():
        values = evaluation.planner[evaluation.planner.reader == reader].set_index("metric")
        cells = [
            f"{values.value[m]:.3f} [{values.value_low[m]:.3f}, {values.value_high[m]:.3f}]"
            for m in ("accuracy", "top5", "cross_entropy")
        ]
        assert [reader, *cells] in rows


def test_an_evaluation_without_intervals(evaluation: Evaluation, capsys):
    bare = {}
    for name in ("perplexity", "differences", "planner"):
        table = getattr(evaluation, name).copy()
        table[[column for column in table if column.endswith(("_low", "_high"))]] = np.nan
        bare[name] = table
    print_evaluation(replace(evaluation, **bare))
    printed = capsys.readouterr().out
    assert printed.count("(no interval)") == sum(map(len, bare.values()))
    assert "nan" not in printed


def test_an_evaluation_of_the_base_lm_alone(evaluation: Evaluation, capsys):
    alone = replace(evaluation, perplexity=evaluation.perplexity[:1], differences=evaluation.differences[:0])
    print_evaluation(alone)
    assert rows_of(capsys.readouterr().out)[0][0] == "none"
