"""What `intervene` and `subnetwork` share: what they write and read back, and what they refuse."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import probekit
from probekit.causal.intervene import InterventionResults
from probekit.causal.subnetwork import SubnetworkResults
from probekit.errors import ProbekitError
from probekit.io import read_json, write_json
from probekit.run.run import Run

FEW = {
    "evaluation.resamples": 100,
    "intervene.layers": [0],
    "intervene.kinds": ["patch"],
    "intervene.distances": [1],
    "intervene.boundaries": 12,
    "subnetwork.documents": 6,
    "subnetwork.steps": 2,
    "subnetwork.penalties": [0.002],
}
FOLDERS = {"intervene": "interventions", "subnetwork": "subnetworks"}

each = pytest.mark.parametrize("command", FOLDERS)


def run_command(command: str, run: Run, **settings: Any) -> InterventionResults | SubnetworkResults:
    return getattr(probekit, command)(run, FEW | settings, quiet=True)


def saved(command: str, run: Run) -> pd.DataFrame:
    return getattr(run, FOLDERS[command])()


@each
def test_results_are_written_and_read_back(command: str, probed_copy: Run):
    results = run_command(command, probed_copy)
    assert results.folder == probed_copy.folder / FOLDERS[command] / "none"
    pd.testing.assert_frame_equal(saved(command, probed_copy), results.table)
    written = read_json(results.folder / "settings.json")
    assert written["intervene"]["distances"] == [1]
    assert written["subnetwork"]["documents"] == 6
    assert written["notes"] == results.notes
    if isinstance(results, SubnetworkResults):
        pd.testing.assert_frame_equal(probed_copy.subnetwork_masks(), results.mask)


@each
def test_an_interruption_keeps_earlier_results(
    command: str, probed_copy: Run, monkeypatch: pytest.MonkeyPatch
):
    before = run_command(command, probed_copy).table

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("probekit.causal.variant_lm.write_json", broken)
    with pytest.raises(OSError, match="disk full"):
        run_command(command, probed_copy)
    pd.testing.assert_frame_equal(saved(command, probed_copy), before)
    assert [path.name for path in Path(probed_copy.folder / FOLDERS[command]).iterdir()] == ["none"]


@each
def test_probes_of_another_target_are_refused(command: str, probed_copy: Run):
    path = probed_copy.folder / "probes" / "settings.json"
    settings = read_json(path)
    settings["probe"]["target"] = "token"
    write_json(path, settings)
    with pytest.raises(ProbekitError, match=r"probes of 'token' .* run `probekit probe"):
        run_command(command, probed_copy)


STEER = {"intervene.kinds": ["steer"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intervene.variant": "joint"}, r"no linear probes of 'joint' .* --probe\.variants .*soft joint"),
        ({"intervene.variant": "gumbel"}, r"intervene\.variant is 'gumbel', which this run has not trained"),
        ({"intervene.layers": [3]}, r"intervene\.layers has 3, but the LM's layers are 0 to 2"),
        ({"intervene.locations": ["hook_z"]}, r"intervene\.locations is 'hook_z'"),
        ({"intervene.distances": [60]}, r"intervene\.distances: a boundary needs 60 tokens before it"),
        (STEER | {"intervene.strengths": [1e30]}, r"intervene\.strengths, which has 1e\+30"),
        (
            STEER | {"intervene.direction": "probe", "intervene.distances": [5]},
            "no softmax probe of 'none' at",
        ),
        ({"intervene.kinds": ["codebook"]}, r"variant 'none' is not conditioned on actions"),
        ({"subnetwork.variant": "joint"}, r"no linear probes of 'joint' .* --probe\.variants .*soft joint"),
        ({"subnetwork.documents": 1}, r"subnetwork\.documents is 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, probed_copy: Run):
    command = next(iter(settings)).partition(".")[0]
    with pytest.raises(ProbekitError, match=message):
        run_command(command, probed_copy, **settings)
    assert not (probed_copy.folder / FOLDERS[command]).exists()
