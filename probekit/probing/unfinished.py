"""What a probing that was stopped has done: the next one with the same settings does not do it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probekit import distributed
from probekit.io import read_metadata, read_tensors, write_tensors
from probekit.probing.results import Tally
from probekit.run.provenance import digest_of
from probekit.run.run import Run

Probed = tuple[list[Tally], dict[str, Tensor]]
"""What probes got right, and the weights of those that are linear."""


class Unfinished:
    """Results of the parts of a grid, a file for each, until the whole is written.

    Args:
        run: The run, with the settings of the probing.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._folder = run, run.folder / "checkpoints" / "probe"
        self._identity = origin(run) | {"settings": run.config.model_dump(mode="json")}

    def once(self, name: str, variant: str, probed: Callable[[], Probed]) -> Probed:
        """What was kept of a part, or what it takes to have it, which is kept.

        Args:
            name: Of the part.
            variant: Whose weights it depends on.
            probed: Reads, fits and scores.
        """
        path = self._folder / f"{name}.safetensors"
        identity = json.dumps(self._identity | {"weights": self._run.weights_digest(variant)})
        kept = path.exists() and read_metadata(path).get("identity") == identity
        # All look before one writes; and all do the same, or they would wait for each other for ever.
        if distributed.total(float(kept), self._run.device) == distributed.count():
            return _read(path)
        found = probed()
        if distributed.is_first():
            _write(path, identity, *found)
        return found

    def forget(self) -> None:
        """Removes what was kept."""
        shutil.rmtree(self._folder, ignore_errors=True)


def origin(run: Run) -> dict[str, Any]:
    """What results depend on beside settings and weights: a file of labels may have been edited."""
    labels = run.config.probe.labels
    return {
        "version": version("probekit-lm"),
        "corpus": run.corpus.facts["fingerprint"],
        "device": run.device.type,
        "labels": None if labels is None else digest_of([Path(labels).expanduser()]),
    }


def _write(path: Path, identity: str, tallies: list[Tally], weights: dict[str, Tensor]) -> None:
    sums = {
        f"sums|{i}|{score}": torch.from_numpy(values)
        for i, tally in enumerate(tallies)
        for score, values in tally.sums.items()
    }
    kept = {f"weights|{name}": value for name, value in weights.items()}
    heads = json.dumps([tally.heads for tally in tallies])
    write_tensors(path, sums | kept, {"identity": identity, "heads": heads})


def _read(path: Path) -> Probed:
    tallies = [Tally(heads, 0, ()) for heads in json.loads(read_metadata(path)["heads"])]
    weights = {}
    for key, value in read_tensors(path).items():
        kind, _, rest = key.partition("|")
        if kind == "weights":
            weights[rest] = value
        else:
            number, _, score = rest.partition("|")
            tallies[int(number)].sums[score] = value.numpy()
    return tallies, weights
