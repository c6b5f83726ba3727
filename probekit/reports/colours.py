"""Colours of all figures, and their scales; the lens page has scales of its own (lens_page.js).

They have one meaning everywhere: viridis for amounts and for whatever has an order (layers, positions), red
and blue around zero for differences, the colour-blind palette for names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.typing import ColorType

AMOUNTS, DIFFERENCES = "viridis", "RdBu_r"
"""Colour maps."""

COLOUR, SEED_COLOUR = "#1f4e79", "#9bb8d3"
"""A value, and those of single seeds beside it."""


def colours_of_names(count: int) -> Sequence[ColorType]:
    """Returns a colour for each of some things without an order."""
    return sns.color_palette("colorblind" if count <= 10 else "husl", count)


def colours_in_order(count: int) -> Sequence[ColorType]:
    """Returns a colour for each of some things in their order, without the lightest ones."""
    return [mpl.colormaps[AMOUNTS](0.9 * place / max(1, count - 1)) for place in range(count)]


def colour_scale(values: pd.Series, *, signed: bool = False) -> ScalarMappable:
    """Returns the colours of amounts, from 0 to the largest, or of differences, as far on both sides of 0."""
    values = values.dropna()
    low, high = (min(0.0, values.min()), max(0.0, values.max())) if len(values) else (0.0, 1.0)
    if signed:
        low, high = -max(-low, high), max(-low, high)
    return ScalarMappable(Normalize(low, high), DIFFERENCES if signed else AMOUNTS)


def colour_bar(
    figure: Figure | SubFigure, axes: Any, scale: ScalarMappable, values: pd.Series, text: str, **style: Any
) -> Axes:
    """Draws a colour bar beside axes, with pointed ends where values exceed the scale."""
    below, above = (values < scale.norm.vmin).any(), (values > scale.norm.vmax).any()
    ends = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[int(below), int(above)]
    bar = figure.colorbar(scale, ax=axes, extend=ends, **style)
    bar.set_label(text)
    return bar.ax
