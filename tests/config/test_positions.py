"""Positions: what is one, and the order in which they stand."""

import pytest

from probekit.config import Config, as_position, nearest, reading_order
from probekit.errors import ProbekitError


@pytest.mark.parametrize(
    ("given", "position"),
    [(3, 3), ("3", 3), ("-2", -2), (0, 0), ("first", "first"), ("mean", "mean"), ("last-12", "last-12")],
)
def test_what_is_a_position(given: object, position: object):
    assert as_position(given) == position
    assert Config().override({"probe.positions": [given]}).probe.positions == (position,)


@pytest.mark.parametrize("given", ["middle", "", 2.5, None, "Last", "1.0", "last-0", "last+1", "first-1"])
def test_what_is_none(given: object):
    with pytest.raises(
        ProbekitError, match=r"probe\.positions\.1: .* is no position; give first, last, mean"
    ):
        Config().override({"probe.positions": [1, given]})


def test_a_position_is_listed_once():
    with pytest.raises(ProbekitError, match="1 is listed twice"):
        Config().override({"probe.positions": ["1", 2, 1]})


def test_the_order_of_reading():
    names = ["mean", "1", "-3", "last-1", "10", "2", "first", "0", "last", "1", "last-10"]
    numbers = ["10", "2", "1", "0", "-3"]
    assert reading_order(names) == [*numbers, "first", "last-10", "last-1", "last", "mean"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["4", "2", "0", "-1"], "2"),
        (["-3", "0", "last"], "0"),
        (["mean", "last", "last-1"], "last-1"),
        (["-3", "9"], "9"),
    ],
)
def test_the_nearest(names: list[str], chosen: str):
    assert nearest(names) == nearest(names[::-1]) == chosen
