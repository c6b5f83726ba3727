"""Figure 1: every way of mixing that a variant trains with is told."""

from figure1_method import MIXING

from probekit.models.mixing import VARIANTS


def test_every_way_of_mixing_is_told():
    assert set(MIXING) == {type(variant.training) for variant in VARIANTS.values()}
