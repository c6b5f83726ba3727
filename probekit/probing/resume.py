"""Saves the finished parts of a probe run, so that it can go on after an interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from probekit import distributed
from probekit.io import read_metadata, read_tensors, write_tensors
from probekit.probing.label_table import labels_digest
from probekit.probing.results import DocumentSums
from probekit.run.run import Run

Probed = tuple[list[DocumentSums], dict[str, Tensor]]
"""Scores of probes, and the weights of those that are linear by the names they are saved under."""


def origin(run: Run) -> dict[str, Any]:
    """What results depend on beside settings and weights; a file of labels may have been edited."""
    return {
        "version": version("probekit-lm"),
        "corpus": run.corpus.facts["fingerprint"],
        "device": run.device.type,
        "dtype": str(run.dtype),  # what lm.dtype auto stands for depends on the machine
        "labels": labels_digest(run.config),
    }


class FinishedParts:
    """Finished parts of a grid, a file for each, kept until the whole grid is written."""

    def __init__(self, run: Run) -> None:
        self._run, self._folder = run, run.folder / "checkpoints" / "probe"
        self._identity = origin(run) | {"settings": run.config.model_dump(mode="json")}

    def read_or_make(self, name: str, variant: str, probed: Callable[[], Probed]) -> Probed:
        """Reads a part that is finished, or makes it and keeps it."""
        path = self._folder / f"{name}.safetensors"
        identity = json.dumps(self._identity | {"weights": self._run.weights_digest(variant)})
        kept = path.exists() and read_metadata(path).get("identity") == identity
        # All processes look before one writes. They must decide the same, or they would deadlock.
        if distributed.total(float(kept), self._run.device) == distributed.count():
            scored = [DocumentSums(readers) for readers in json.loads(read_metadata(path)["readers"])]
            weights = {}
            for key, tensor in read_tensors(path).items():
                kind, _, rest = key.partition("|")
                if kind == "weights":
                    weights[rest] = tensor
                else:
                    number, _, of = rest.partition("|")
                    scored[int(number)].sums[of] = tensor.numpy()
            return scored, weights
        scored, weights = probed()
        if distributed.is_first():
            tensors = {f"weights|{key}": tensor for key, tensor in weights.items()} | {
                f"sums|{number}|{of}": torch.from_numpy(values)
                for number, part in enumerate(scored)
                for of, values in part.sums.items()
            }
            readers = json.dumps([part.readers for part in scored])
            write_tensors(path, tensors, {"identity": identity, "readers": readers})
        return scored, weights

    def forget(self) -> None:
        """Removes all parts."""
        shutil.rmtree(self._folder, ignore_errors=True)
