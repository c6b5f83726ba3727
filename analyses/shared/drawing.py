"""Drawings of boxes and wires, for the figures of models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

XY = tuple[float, float]
Kind = Literal["model", "adapter", "optional", "gradient"]

INCHES = 0.56
"""Size of a unit of a drawing."""
SUM = 0.2
"""Radius of the circles that add."""
FRAME = "#eef2f6"
"""Colour behind parts that belong together."""

_STYLES: dict[Kind, tuple[str, str, str]] = {
    "model": ("white", "0.25", "-"),
    "adapter": ("#fde3c8", "#b35900", "-"),
    "optional": ("white", "0.45", "--"),
    "gradient": ("white", "#7b3294", "--"),
}
"""Face of the boxes, colour of edges and wires, their line."""


class Box(NamedTuple):
    """A part of the model: its centre, text and size."""

    centre: XY
    text: str
    width: float = 2.5
    kind: Kind = "model"
    height: float = 0.72


class Wire(NamedTuple):
    """A line through some corners, with an arrow at its end."""

    corners: tuple[XY, ...]
    kind: Kind = "model"


class Spot(NamedTuple):
    """Where a point of the model is drawn, and on which side of it its name is."""

    point: XY
    side: Literal["left", "right"]


@dataclass(frozen=True)
class Drawing:
    """Parts of a drawing; `+` lays one over another."""

    boxes: tuple[Box, ...] = ()
    wires: tuple[Wire, ...] = ()
    sums: tuple[XY, ...] = ()
    notes: tuple[tuple[XY, str], ...] = ()
    spots: dict[str, Spot] = field(default_factory=dict)

    def __add__(self, other: Drawing) -> Drawing:
        return Drawing(
            self.boxes + other.boxes,
            self.wires + other.wires,
            self.sums + other.sums,
            self.notes + other.notes,
            self.spots | other.spots,
        )


def empty_figure(left: float, right: float, bottom: float, top: float) -> tuple[Figure, Axes]:
    """Makes a figure for a drawing of some extent, filled by axes without a frame."""
    figure = Figure(figsize=(INCHES * (right - left), INCHES * (top - bottom)))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.set_axis_off()
    return figure, axes


def frame(axes: Axes, corner: XY, width: float, height: float) -> None:
    """Draws a rounded area behind parts that belong together, from its lower left corner."""
    area = FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.25", zorder=0)
    area.set(facecolor=FRAME, edgecolor="0.7")
    axes.add_patch(area)


def draw(axes: Axes, drawing: Drawing) -> None:
    """Draws everything but the spots."""
    arrow = {"arrowstyle": "-|>", "shrinkA": 0.0, "shrinkB": 0.0, "mutation_scale": 13}
    for wire in drawing.wires:
        _, colour, dashes = _STYLES[wire.kind]
        *begin, end = wire.corners
        axes.plot(*zip(*begin, strict=True), color=colour, linestyle=dashes, linewidth=1.6, zorder=1)
        line = {"color": colour, "linestyle": dashes, "linewidth": 1.6, "joinstyle": "miter"}
        axes.annotate("", end, begin[-1], arrowprops=arrow | line, zorder=1)
    for x, y in drawing.sums:
        axes.add_patch(Circle((x, y), SUM, facecolor="white", edgecolor="0.25", linewidth=1.4, zorder=3))
        for dx, dy in ((0.6 * SUM, 0.0), (0.0, 0.6 * SUM)):
            axes.plot([x - dx, x + dx], [y - dy, y + dy], color="0.25", linewidth=1.4, zorder=4)
    for box in drawing.boxes:
        face, edge, dashes = _STYLES[box.kind]
        corner = (box.centre[0] - box.width / 2, box.centre[1] - box.height / 2)
        area = FancyBboxPatch(corner, box.width, box.height, "round,pad=0,rounding_size=0.12", zorder=2)
        area.set(facecolor=face, edgecolor=edge, linestyle=dashes, linewidth=1.3)
        axes.add_patch(area)
        axes.text(*box.centre, box.text, ha="center", va="center", fontsize=13, zorder=3)
    for (x, y), text in drawing.notes:
        axes.text(x, y, text, ha="center", va="center", fontsize=12.5, style="italic")
