"""Probes that are kept say again what they were scored by."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from probekit.errors import ProbekitError
from probekit.probing.activations import Reader
from probekit.probing.grid import TESTED_ON, make_grid
from probekit.probing.probe import probe
from probekit.probing.results import Cell, SavedProbes
from probekit.probing.targets import find_target
from probekit.run.run import Run


@pytest.fixture(scope="module")
def probed(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("kept") / "run"))
    settings = {
        "probe.solvers": ["softmax", "ridge", "mlp"],
        "probe.locations": ["hook_resid_post", "attn.hook_z"],
        "probe.variants": ["none", "soft"],
        "probe.control": False,
        "probe.code_length": False,
    }
    probe(run, settings, quiet=True)
    return run.with_settings(settings)


@pytest.mark.parametrize("solver", ["softmax", "ridge"])
@pytest.mark.parametrize("variant", ["none", "soft"])
def test_kept_probes_have_the_accuracy_of_the_table(variant: str, solver: str, probed: Run):
    table = probed.probes()
    grid = make_grid(probed.corpus, probed.config.probe, find_target(probed.corpus, "action", None), 0)
    saved = SavedProbes(probed.folder / "probes", variant, 0)
    places = [("hook_resid_post", 2), ("attn.hook_z", 1)]
    (blocks,) = [Reader(probed, variant, places, grid.distances).read(grid.examples[TESTED_ON])]
    labels = torch.from_numpy(grid.labels(TESTED_ON, 1))
    for (location, layer), activations in zip(places, (part for b in blocks for part in b), strict=True):
        for distance, X in zip(grid.distances, activations, strict=True):
            found = saved[Cell(location, layer, distance, solver=solver)].log_probabilities(X)
            row = table[
                (table.reader == "probe") & (table.variant == variant) & (table.solver == solver)
                & (table.location == location) & (table.layer == layer) & (table.distance == distance)
            ]  # fmt: skip
            accuracy = (found.argmax(-1) == labels).float().mean().item()
            assert accuracy == pytest.approx(row.accuracy.item(), abs=1e-6)


def test_only_linear_probes_are_kept(probed: Run):
    saved = SavedProbes(probed.folder / "probes", "none", 0)
    assert {cell.solver for cell in saved.cells} == {"softmax", "ridge"}
    assert len(saved.cells) == 2 * 2 * 3 * len(probed.config.probe.distances)
    assert all(Cell.of(cell.key) == cell for cell in saved.cells)
    cells = [Cell("hook_resid_post", layer, 1) for layer in range(3)]
    X = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    together = saved.stacked(cells).log_probabilities(X)
    for one, cell, x in zip(together, cells, X, strict=True):
        np.testing.assert_allclose(one, saved[cell].log_probabilities(x), rtol=1e-5)


@pytest.mark.parametrize(
    ("variant", "seed", "cell", "said"),
    [
        ("joint", 0, None, r"no linear probes of 'joint' with seed 0 .*probekit probe"),
        ("none", 7, None, r"with seed 7"),
        ("none", 0, Cell("hook_resid_post", 9, 1), r"layer 9.*layers 0, 1, 2"),
        ("none", 0, Cell("hook_resid_mid", 1, 1), r"locations attn\.hook_z, hook_resid_post"),
    ],
)
def test_what_is_not_kept(variant: str, seed: int, cell: Cell | None, said: str, probed: Run):
    with pytest.raises(ProbekitError, match=said):
        SavedProbes(Path(probed.folder) / "probes", variant, seed)[cell or Cell("x", 0, 1)]
