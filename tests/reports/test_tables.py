"""Display tables of results: every number in its cell."""

import re

import numpy as np
import pandas as pd
import pytest
import synthetic_results as made
from read_tables import shows

from probekit.reports.display import heading
from probekit.reports.tables import (
    baseline_notes,
    best_by_step,
    intervention_notes,
    intervention_tables,
    over_training_table,
    subnetwork_notes,
    subnetwork_table,
    sweep_tables,
)


@pytest.mark.parametrize("variant", ["none", "soft"])
def test_every_number_of_interventions(variant: str):
    results = made.interventions(variant)
    tables = intervention_tables(results)
    assert [re.split(r"[:;]", table.caption)[0] for table in tables] == [
        "erase",
        "steer",
        "Accuracy of a linear probe where actions were erased",
        "Share of sentences written anew that have the action aimed at",
    ]
    checked = 0
    for table, kind in zip(tables, ("erase", "steer", "erase", "steer"), strict=True):
        assert f"variant {variant}, distance 2, 4" in table.caption
        for row in results[results.kind == kind].itertuples():
            condition = row.condition + ("" if np.isnan(row.strength) else f" × {row.strength:g}")
            found = table.cells[
                (table.cells.condition == condition) & (table.cells.distance == str(row.distance))
            ]
            if heading(row.metric) in found:
                checked += 1
                assert found.layer.tolist() == ["resid post 1*" + "+" * (variant == "soft")]
                assert shows(found[heading(row.metric)].item(), (row.value, row.value_low, row.value_high))
    assert checked == len(results)
    notes = " ".join(intervention_notes(results))
    assert "* the edit changes the activation" in notes
    assert ("+ the adapter" in notes) == (variant == "soft")


def test_every_number_of_a_subnetwork():
    results = made.subnetwork()
    table = subnetwork_table(results)
    assert table.caption.startswith("Without some of 6 components, on 50 test documents")
    assert table.cells.condition.tolist() == ["nothing", "the subnetwork", "best alone", "random"]
    assert table.cells.components.tolist() == ["0", "2", "2", "2"]
    means = results[results.draw.isna()].set_index(["condition", "metric"])
    for (_, cells), condition in zip(table.cells.iterrows(), made.CONDITIONS, strict=True):
        for metric in made.SUBNETWORK:
            if (condition, metric) in means.index:
                row = means.loc[(condition, metric)]
                assert shows(cells[heading(metric)], (row.value, row.value_low, row.value_high))
            else:
                assert (condition, cells[heading(metric)]) == ("whole", "")
    mask = pd.DataFrame({"component": ["head 0", "head 1", "mlp 0"], "removed": [True, False, True]})
    alone, _, which = subnetwork_notes(results, mask)
    assert "the mean of 2 draws" in alone
    assert which == "The subnetwork (2 of 3): head 0, mlp 0"


def probed(probe_bits: float, free: dict[str, float], metric: str = "bits") -> pd.DataFrame:
    """A probe whose gain is over the bag of words, and baselines at its position, by their bits on test."""
    rows = [
        {"reader": reader, "position": "last", "horizon": 1, metric: bits} for reader, bits in free.items()
    ]
    gain = probe_bits - free["bag of words"]
    own = {"reader": "probe", "position": "last", "horizon": 1, metric: probe_bits, "gain": gain}
    table = pd.DataFrame([*rows, own | {"gain_over": "bag of words"}])
    return table.assign(injected=False, **({"r2": table[metric]} if metric == "r2" else {}))


@pytest.mark.parametrize("metric", ["bits", "r2"])
def test_a_baseline_that_is_better_on_test_is_named_where_a_gain_hides_it(metric: str):
    free = {"bag of words": 0.1, "skip n-gram": 0.5, "prior": 0.0}
    (note,) = baseline_notes(probed(0.2, free, metric))
    assert note.startswith(
        "1 of 1 cells with a gain above zero read less than the skip n-gram: the bag of wor"
    )
    assert "is on test examples (0.500 " in note
    assert not [*baseline_notes(probed(0.6, free, metric))], "it is above both"
    assert not [*baseline_notes(probed(0.05, free, metric))], "it has no gain"
    assert not [*baseline_notes(probed(0.2, free | {"skip n-gram": 0.15}, metric))]


def test_the_best_layer_of_every_step_is_chosen_on_validation_documents():
    results = made.over_training()
    best = best_by_step(results)
    assert best.layer.tolist() == [0, 1, 2]
    assert set(best.distance) == {1}
    first = results[(results.step == made.STEPS[0]) & (results.reader == "probe") & (results.distance == 1)]
    assert first.loc[first.accuracy.idxmax()].layer != 0  # on test documents another is
    table = over_training_table(results, "lm")
    assert table.cells.step.tolist() == [str(step) for step in made.STEPS]
    for (_, cells), row in zip(table.cells.iterrows(), best.itertuples(), strict=True):
        assert shows(cells[heading("accuracy")], (row.accuracy, row.accuracy_low, row.accuracy_high))
        assert shows(cells[heading("gain")], (row.gain, row.gain_low, row.gain_high))


def test_every_mean_of_a_sweep():
    rows = [
        {"member": member, "variant": "soft", "actions": "planner", "metric": metric, "texts": texts}
        | {
            "length": length,
            "seed": seed,
            "value": number + 0.5,
            "value_low": number,
            "value_high": number + 1.0,
        }
        | {"seed_spread": 0.25 if seed is None else None, "seeds": 2, "documents": 50}
        for number, (member, (metric, texts, length), seed) in enumerate(
            (member, measured, seed)
            for member in ("a", "b")
            for measured in (("perplexity", "test documents", 0), ("rouge2", "continuations", 1200))
            for seed in (0, 1, None)
        )
    ]
    results = pd.DataFrame(rows)
    perplexity, rouge = sweep_tables(results)
    assert perplexity.caption.startswith("perplexity ↓ of test documents, mean over seeds")
    assert rouge.caption.startswith("ROUGE-2 ↑ of continuations of 1,200 tokens, mean over seeds")
    for table, metric in ((perplexity, "perplexity"), (rouge, "rouge2")):
        means = results[results.seed.isna() & (results.metric == metric)]
        assert table.cells.member.tolist() == ["a", "b"]
        assert table.cells["spread over seeds"].tolist() == ["0.250", "0.250"]
        for cell, row in zip(table.cells["mean over seeds"], means.itertuples(), strict=True):
            assert shows(cell, (row.value, row.value_low, row.value_high))
