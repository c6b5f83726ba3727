"""Figures as SVG, the same bytes for the same figure."""

from __future__ import annotations

from io import BytesIO

import matplotlib as mpl
from matplotlib.figure import Figure


def svg_of(figure: Figure) -> bytes:
    """A figure as SVG, letters as outlines: it looks the same whatever fonts there are."""
    buffer = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "probekit", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
