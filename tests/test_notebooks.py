"""Every notebook runs from top to bottom on less data, and is stored with what it found."""

import base64
import json
import re
import shlex
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from probekit.cli import main
from probekit.config import Config
from probekit.errors import ProbekitError

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
ABSOLUTE = re.compile(r"(?<![\w.:/<])/(?:home|root|tmp|work|usr|Users|private|var|opt|mnt)/|[A-Z]:\\\\")
PNG = b"\x89PNG"

TINY = {
    "corpus.planted.documents": 160,
    "corpus.planted.actions": 8,
    "corpus.planted.vocabulary": 60,
    "actions.k": 8,
    "actions.dimensions": 16,
    "lm.width": 32,
    "lm.heads": 2,
    "lm.positions": 48,
    "lm.vocabulary": 560,
    "training.window": 48,
    "training.lm.epochs": 1,
    "evaluation.resamples": 100,
    "evaluation.questions": 20,
}
QUICK = TINY | {
    "lm.layers": 3,
    "planner.width": 32,
    "training.planner.epochs": 1,
    "training.adapter.epochs": 1,
}
SMALL: dict[str, dict[str, Any]] = {
    "01_first_run.ipynb": {
        "SETTINGS": QUICK | {"mixing.variants": ["fixed", "oracle", "predicted", "soft"]},
    },
    "02_probing.ipynb": {"SETTINGS": QUICK | {"mixing.variants": ["soft"]}, "DISTANCES": [1, 4]},
    "03_mixing_fraction.ipynb": {"SETTINGS": QUICK, "SHARES": [0.0, 1.0], "SEEDS": [0]},
    "04_depth_ensemble.ipynb": {"SETTINGS": TINY, "LAYERS": 3},
    "05_causal_tests.ipynb": {
        "SETTINGS": TINY | {"mixing.variants": ["soft"]},
        "BOUNDARIES": 8,
        "SAMPLES": 3,
    },
    "06_next_sentence.ipynb": {"FIGURES": str(FOLDER.parent / "figures")},
}
"""What takes the place of the values in the cell tagged `parameters`, by notebook."""


def read(name: str) -> NotebookNode:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    return notebook


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook: NotebookNode) -> list[bytes]:
    found = [output.get("data", {}).get("image/png") for output in outputs(notebook)]
    return [base64.b64decode(picture) for picture in found if picture]


def with_parameters(notebook: NotebookNode, values: dict[str, Any]) -> NotebookNode:
    """The notebook with a cell after the tagged one that sets other values."""
    (place,) = (
        number for number, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    defaults: dict[str, Any] = {}
    exec(notebook.cells[place].source, defaults)  # noqa: S102 - our own notebook
    assert values.keys() <= defaults.keys(), "the notebook reads no such parameter"
    cell = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in values.items()))
    notebook.cells.insert(place + 1, cell)
    return notebook


def test_every_notebook_is_tested():
    assert set(NOTEBOOKS) == SMALL.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name: str, tmp_path: Path):
    notebook = with_parameters(read(name), SMALL[name])
    stored = len(pictures(notebook))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert_clean(notebook)
    assert len(pictures(notebook)) == stored, "a picture is missing, or was not saved"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_notebook_shows_what_it_found(name: str):
    notebook = read(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from the top"
    found = pictures(notebook)
    assert found
    assert all(picture.startswith(PNG) for picture in found)
    assert_clean(notebook)
    assert not ABSOLUTE.search(json.dumps(notebook))
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_settings_and_commands_in_the_text_are_understood(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        values: dict[str, Any] = {}
        exec(block, values)  # noqa: S102 - our own notebook
        Config.from_preset(values["PRESET"]).override({"method": "depth-ensemble", **values["SETTINGS"]})
    for line in re.findall(r"^probekit (.*)$", text, re.MULTILINE):
        with pytest.raises(ProbekitError, match=r"device is 'cuda'|does not exist"):
            main([*shlex.split(line), "--debug"])


def assert_clean(notebook: NotebookNode) -> None:
    """No cell failed, warned or drew a progress bar."""
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert "\r" not in output.get("text", "")
