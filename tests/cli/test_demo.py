"""`probekit demo` as it is typed."""

from pathlib import Path

import pytest
from running import Capture, printed

from probekit.config import Config


def test_the_demo_goes_all_the_way_and_does_nothing_twice(
    capsys: Capture, copy: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config.override(
        {"probe.variants": ["soft"], "probe.layers": [1], "probe.positions": [1, 2]}
    )
    monkeypatch.setattr(Config, "from_preset", lambda name: {"demo": config}[name])
    weights = copy / "lm" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    out = printed(capsys, "demo", "--out", copy, "--quiet")
    titles = ["Corpus", "Actions (8", "Training", "Perplexity per token on", "Next action on", "Best cells"]
    places = [out.index(title) for title in titles]
    assert places == sorted(places)
    assert weights.stat().st_mtime_ns == before
    assert (copy / "evaluation.json").exists()
    assert len(list((copy / "probes").glob("*.png"))) == 2
