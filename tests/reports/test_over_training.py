"""Figures over training show what the table holds, by step."""

import numpy as np
import pandas as pd
import pytest
from synthetic_probes import DISTANCES, LAYERS, accuracy_of, probe_table

from probekit.errors import ProbekitError
from probekit.reports.plots import draw_over_training, over_training_numbers

STEPS = (0, 1, 10, 100)


@pytest.fixture
def table() -> pd.DataFrame:
    """Accuracies grow with the steps; baselines do not."""
    parts = []
    for place, step in enumerate(STEPS):
        part = probe_table(("none",), seeds=(0, 1)).assign(step=step)
        of_probes = part.reader == "probe"
        part.loc[of_probes, ["accuracy", "accuracy_low", "accuracy_high"]] *= 0.5 + place / 6
        part["validation_cross_entropy"] = 2.0 - part.accuracy
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


LOSSES = pd.DataFrame(
    {
        "step": [1, 10, 50, 50, 100, 100],
        "loss": [5, 4, 3, np.nan, 2, np.nan],
        "validation_loss": [np.nan] * 3 + [3.1, np.nan, 2.2],
    }
)


def test_numbers_are_means_over_seeds(table: pd.DataFrame):
    numbers = over_training_numbers(table, location="attn.hook_z", solver="ridge")
    probes = numbers[numbers.reader == "probe"].set_index(["step", "layer", "distance"]).value
    for place, step in enumerate(STEPS):
        for layer in LAYERS:
            for distance in DISTANCES:
                if (layer, distance) == (1, 4):
                    assert np.isnan(probes[step, layer, distance])
                    continue
                expected = accuracy_of(layer, distance) + 0.005 - 0.02
                assert probes[step, layer, distance] == pytest.approx(expected * (0.5 + place / 6))


def test_lines_go_through_the_numbers(table: pd.DataFrame):
    numbers = over_training_numbers(table)
    figure = draw_over_training(numbers, LOSSES)
    by_layer, by_distance, losses, _ = figure.axes
    assert by_distance.get_title() == "by distance, layer 2"
    probes = numbers[(numbers.reader == "probe") & (numbers.distance == 1)]
    drawn = {line.get_label(): line.get_xydata() for line in by_layer.get_lines()}
    for layer in LAYERS:
        np.testing.assert_allclose(drawn[f"layer {layer}"], probes[probes.layer == layer][["step", "value"]])
    known = numbers[(numbers.reader == "bigram") & (numbers.distance == 1)]
    assert drawn["bigram"][0][1] == pytest.approx(known.value.iloc[-1])
    trained = next(line for line in losses.get_lines() if line.get_label() == "training")
    assert trained.get_ydata().tolist() == [5, 4, 3, 2]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"metric": "f1"}, "metric is 'f1'; it must be one of accuracy"),
        ({"location": "hook_q"}, "nothing was probed at 'hook_q'"),
    ],
)
def test_what_is_not_there_is_named(table: pd.DataFrame, asked: dict[str, str], said: str):
    with pytest.raises(ProbekitError, match=said):
        over_training_numbers(table, **asked)
