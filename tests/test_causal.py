"""What holds alike for the causal tests of what probes read: `intervene` and `subnetwork`."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import probekit
from probekit.errors import ProbekitError
from probekit.io import read_json, write_json
from probekit.run.run import Run

FEW = {"evaluation.resamples": 100, "intervene.layers": [0], "intervene.kinds": ["patch"]}
FEW |= {"intervene.distances": [1], "intervene.scenes": 12}
FEW |= {"subnetwork.documents": 6, "subnetwork.steps": 2, "subnetwork.penalties": [0.002]}
COMMANDS = {"intervene": "interventions", "subnetwork": "subnetworks"}
"""Commands, and the folders of their code and of their results."""

each = pytest.mark.parametrize("command", COMMANDS)


def results(run: Run, command: str) -> pd.DataFrame:
    """What the command has left in a run."""
    return getattr(run, COMMANDS[command])()


@each
def test_probes_of_something_else_are_refused(command: str, probed_copy: Run):
    path = probed_copy.folder / "probes" / "settings.json"
    settings = read_json(path)
    settings["probe"]["target"] = "token"
    write_json(path, settings)
    with pytest.raises(ProbekitError, match=r"probes of 'token' .* run `probekit probe"):
        getattr(probekit, command)(probed_copy, FEW, quiet=True)


@each
def test_a_run_without_results_says_how_to_make_them(command: str, probed_copy: Run):
    with pytest.raises(ProbekitError, match=f"run `probekit {command}"):
        results(probed_copy, command)


@each
def test_an_interruption_leaves_what_was_there(
    command: str, probed_copy: Run, monkeypatch: pytest.MonkeyPatch
):
    folder = COMMANDS[command]
    before = getattr(probekit, command)(probed_copy, FEW, quiet=True).table

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(f"probekit.{folder}.{command}.write_json", broken)
    with pytest.raises(OSError, match="disk full"):
        getattr(probekit, command)(probed_copy, FEW, quiet=True)
    pd.testing.assert_frame_equal(results(probed_copy, command), before)
    assert [path.name for path in Path(probed_copy.folder / folder).iterdir()] == ["none"]
