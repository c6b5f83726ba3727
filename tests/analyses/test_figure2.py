"""Figure 2: every location of the table is marked, on the line where it is read, and no text is covered."""

import itertools

import pytest
from figure2_locations import LOCATIONS, block_figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from probekit.models.locations import LABELS, label


@pytest.fixture(scope="module", params=[False, True], ids=["sequential", "parallel"])
def parallel(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def figure(parallel: bool) -> Figure:
    drawn = block_figure(parallel=parallel)
    FigureCanvasAgg(drawn).draw()
    return drawn


def texts(figure: Figure) -> dict[str, Text]:
    return {text.get_text(): text for text in figure.axes[0].texts if not isinstance(text, Annotation)}


def box(artist: Text | FancyBboxPatch, figure: Figure) -> Bbox:
    return artist.get_window_extent(figure.canvas.get_renderer())


def test_every_location_has_its_dot_label_and_name(figure: Figure, parallel: bool):
    there = texts(figure)
    for number, location in enumerate(LOCATIONS, start=1):
        shown = location.parallel or not parallel
        assert (str(number) in there) == (location.name in there) == shown
        if shown:
            x, y = there[str(number)].get_position()
            called = next(
                text
                for text in figure.axes[0].texts
                if text.get_text() == label(location.name) and text.get_weight() == "bold"
            )
            for text in (called, there[location.name]):
                assert abs(text.get_position()[0] - x) < 0.5
                assert abs(text.get_position()[1] - y) < 0.1
    assert ("hook_resid_mid" in there) != parallel
    assert [location.name for location in LOCATIONS] == [*LABELS]


def test_no_text_covers_another_or_leaves_the_picture(figure: Figure):
    shown = [text for text in figure.axes[0].texts if not isinstance(text, Annotation)]
    boxes = [box(text, figure) for text in shown]
    for (a, one), (b, other) in itertools.combinations(zip(shown, boxes, strict=True), 2):
        assert not one.overlaps(other), f"{a.get_text()!r} and {b.get_text()!r}"
    for text, extent in zip(shown, boxes, strict=True):
        assert figure.bbox.contains(*extent.min), text.get_text()
        assert figure.bbox.contains(*extent.max), text.get_text()


def test_the_action_enters_between_the_two_places_of_the_heads(figure: Figure):
    there, axes = texts(figure), figure.axes[0]
    (x, low), (_, high) = (there[number].get_position() for number in "34")
    sums = [p.center for p in axes.patches if isinstance(p, Circle) and p.radius < 0.25]
    (at,) = [center for center in sums if center[0] == x]
    assert low < at[1] < high
    arrows = [t for t in axes.texts if isinstance(t, Annotation) and t.xyann[1] == at[1]]
    assert any(arrow.xy[0] == pytest.approx(x + 0.2) for arrow in arrows)
