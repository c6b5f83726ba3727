"""Lines with intervals: what is drawn and written is what the table has."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from probekit.reports.figures import draw_intervals


def test_values_intervals_and_seeds_are_drawn_where_they_are():
    rows = [("a", None, 1.0, 0.5, 1.75), ("a", 0, 0.9, 0.4, 1.6), ("a", 1, 1.1, 0.6, 1.9)]
    rows += [("b", None, -0.25, np.nan, np.nan)]
    table = pd.DataFrame(rows, columns=["name", "seed", "value", "value_low", "value_high"])
    axes = Figure().subplots()
    draw_intervals(axes, table, ["b", "a", "not there"], {"a": "first"})
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "first", "not there"]
    assert [text.get_text() for text in axes.texts] == ["−0.25", "1.00 [0.50, 1.75]"]
    points = {tuple(map(tuple, line.get_xydata())) for line in axes.lines if line.get_marker() in ("o", "|")}
    assert ((1.0, 1.0),) in points
    assert ((0.9, 1.0), (1.1, 1.0)) in points
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first name is at the top"
