"""Settings by their dotted names."""

from typing import Any

import pytest

from probekit.config import merge, nest
from probekit.errors import ProbekitError


def test_merging_changes_neither_side():
    base, over = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}
    assert merge(base, over) == {"a": {"b": 3, "c": 2}}
    assert base == {"a": {"b": 1, "c": 2}}
    assert over == {"a": {"b": 3}}


def test_nesting_puts_every_setting_into_its_section():
    assert nest({"a.b": 1, "a.c.d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


@pytest.mark.parametrize("values", [{"lm": 3, "lm.layers": 2}, {"seed": 1, "seed.x.y": 2}])
def test_a_section_and_its_setting_are_not_given_together(values: dict[str, Any]):
    with pytest.raises(
        ProbekitError, match=f"^{list(values)[1]} is given, and {next(iter(values))} as a whole"
    ):
        nest(values)
