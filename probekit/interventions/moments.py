"""Sums over activations of the split that probes are fitted on, at every place and distance."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from probekit.config import ProbedName
from probekit.probing.activations import Place, Reader
from probekit.probing.grid import FITTED_ON, Grid
from probekit.probing.solvers import Moments
from probekit.progress import Progress
from probekit.run import Run


def moments_at(
    run: Run, variant: ProbedName, places: Sequence[Place], grid: Grid, progress: Progress
) -> dict[tuple[Place, int], Moments]:
    """The sums of one probe each, by place and distance, in one forward pass over the examples.

    Args:
        run: The run.
        variant: Whose activations.
        places: Where.
        grid: The examples, with the action of the sentence at their anchor, and the distances.
        progress: Shows how far it is.
    """
    reader = Reader(run, variant, places, grid.distances)
    distances, classes = len(grid.distances), grid.target.classes
    sums = [
        Moments.zeros(len(block.places) * distances, block.width, classes, run.device)
        for block in reader.blocks
    ]
    examples, labels = grid.examples[FITTED_ON], torch.from_numpy(grid.labels(FITTED_ON, 1)).to(run.device)
    with progress.task(f"{variant}: read the split {FITTED_ON!r}", total=len(examples)) as task:
        for rows, blocks in reader.chunks(examples):
            for moments, values in zip(sums, blocks, strict=True):
                moments.add(values.flatten(0, 1), labels[rows])
            task.advance(rows.stop - rows.start)
    return {
        (place, distance): _one(moments, distances * p + d)
        for block, moments in zip(reader.blocks, sums, strict=True)
        for p, place in enumerate(block.places)
        for d, distance in enumerate(grid.distances)
    }


def _one(moments: Moments, probe: int) -> Moments:
    """The sums of one probe of a batch, as a batch of its own."""
    at = slice(probe, probe + 1)
    return Moments(
        moments.class_counts[at],
        moments.class_sums[at],
        moments.mean[at],
        moments.scatter[at],
        moments.dtype,
    )
