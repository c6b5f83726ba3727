"""The probe grid: the examples that all of its cells share.

These are the anchors that every distance and horizon can use, so that cells never differ by their examples.
Distances and horizons that too few anchors can use are empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from probekit.config import ProbeSettings
from probekit.data.corpus import Corpus
from probekit.errors import ProbekitError
from probekit.probing.targets import NO_LABEL, Examples, Target, find_examples, reached

FITTED_ON, CHOSEN_ON, TESTED_ON = "probe", "validation", "test"
"""The splits that probes use; none of them trained the LM or the planner."""

MINIMUM_EXAMPLES = 20
"""A cell with fewer examples in any of its splits stays empty."""

LEAST_SHARED = 0.1
"""So does one that would leave less than this share of the nearest cell's anchors to all."""

LEAST_DOCUMENTS = 20
"""Examples are drawn from this many documents at least, if there are so many."""

FEW_SHARED = 0.5
"""Below this share of the anchors that some cell can use, a note says what the farthest distance costs."""


@dataclass(frozen=True)
class Grid:
    """The examples of a grid.

    Attributes:
        target: What is predicted.
        distances: Distances that are not empty.
        horizons: Horizons that are not empty.
        examples: For every split its examples, with labels of these horizons.
        empty: Number of test examples of every distance and horizon that is empty.
        notes: Lines to show the user.
    """

    target: Target
    distances: tuple[int, ...]
    horizons: tuple[int, ...]
    examples: Mapping[str, Examples]
    empty: Mapping[tuple[int, int], int]
    notes: tuple[str, ...]

    def labels(self, split: str, horizon: int) -> np.ndarray:
        """Labels at a horizon `[examples]`."""
        return self.examples[split].labels[:, self.horizons.index(horizon)]


def make_grid(corpus: Corpus, settings: ProbeSettings, target: Target, seed: int) -> Grid:
    """Draws documents, and finds the anchors that all cells share.

    Args:
        corpus: The corpus.
        settings: Distances, horizons, anchors and the largest number of examples.
        target: What is predicted.
        seed: Seed of the draw of documents to fit on and to choose on; all test documents are used.

    Raises:
        ProbekitError: A split has no documents, or no cell has enough examples.
    """
    every: dict[str, Examples] = {}
    usable: dict[str, np.ndarray] = {}
    for split in (FITTED_ON, CHOSEN_ON, TESTED_ON):
        documents = corpus.documents(split)
        if not len(documents):
            raise ProbekitError(
                f"the corpus keeps no documents in the split {split!r}; build it with a "
                f"corpus.{split}_fraction above 0"
            )
        if split != TESTED_ON:
            documents = _drawn(corpus, documents, settings, seed)
        every[split] = find_examples(corpus, documents, target, settings.horizons, settings.anchors)
        near = [reached(corpus, every[split], distance) for distance in settings.distances]
        labelled = every[split].labels != NO_LABEL
        usable[split] = np.stack(near, axis=1)[:, :, None] & labelled[:, None, :]

    d_kept, h_kept = _filled(usable, settings)
    examples = {}
    for split, whole in every.items():
        rows = np.flatnonzero(usable[split][:, d_kept][:, :, h_kept].all((1, 2)))
        if split != TESTED_ON:  # of a few long documents every n-th example
            rows = rows[:: max(1, -(-len(rows) // settings.max_examples))]
        kept = whole[rows]
        examples[split] = Examples(kept.document, kept.anchor, kept.sentence, kept.labels[:, h_kept])
    grid = Grid(
        target,
        tuple(settings.distances[d] for d in d_kept),
        tuple(settings.horizons[h] for h in h_kept),
        examples,
        empty={
            (distance, horizon): int(usable[TESTED_ON][:, d, h].sum())
            for d, distance in enumerate(settings.distances)
            for h, horizon in enumerate(settings.horizons)
            if d not in d_kept or h not in h_kept
        },
        notes=(),
    )
    most = int(usable[TESTED_ON].any((1, 2)).sum())
    return replace(grid, notes=tuple(_notes(grid, most)))


def _drawn(corpus: Corpus, documents: np.ndarray, settings: ProbeSettings, seed: int) -> np.ndarray:
    """Documents in random order, as long as they hold `max_examples` anchors at most.

    But at least `LEAST_DOCUMENTS`, or all that there are; their anchors are thinned out later.
    """
    order = np.random.default_rng(seed).permutation(documents)
    ends = corpus.document_sentences if settings.anchors == "sentence" else corpus.document_tokens
    # Nothing is before the first sentence, so it is no anchor.
    anchors = np.cumsum(np.maximum(ends[order + 1] - ends[order] - 1, 0))
    return order[: max(LEAST_DOCUMENTS, int((anchors <= settings.max_examples).sum()))]


def _filled(usable: Mapping[str, np.ndarray], settings: ProbeSettings) -> tuple[list[int], list[int]]:
    """Numbers of the distances and horizons that are not empty.

    The farthest distance is dropped until enough anchors are left to all, then the farthest horizon.

    Args:
        usable: By split, whether each distance and horizon can use each anchor, bool
            `[examples, distances, horizons]`.
        settings: The distances and horizons.
    """
    distances = sorted(range(len(settings.distances)), key=settings.distances.__getitem__)
    horizons = sorted(range(len(settings.horizons)), key=settings.horizons.__getitem__)

    def anchors(part: np.ndarray, distances: list[int], horizons: list[int]) -> int:
        return int(part[:, distances][:, :, horizons].all((1, 2)).sum())

    wanted = {
        split: max(MINIMUM_EXAMPLES, LEAST_SHARED * anchors(part, distances[:1], horizons[:1]))
        for split, part in usable.items()
    }

    def enough(distances: list[int], horizons: list[int]) -> bool:
        return all(anchors(part, distances, horizons) >= wanted[split] for split, part in usable.items())

    while len(distances) > 1 and not enough(distances, horizons[:1]):
        distances.pop()
    while len(horizons) > 1 and not enough(distances, horizons):
        horizons.pop()
    if not enough(distances, horizons):
        raise ProbekitError(
            f"no distance and horizon has {MINIMUM_EXAMPLES} examples in each of the splits "
            f"{', '.join(usable)}; lower probe.distances or probe.horizons, raise probe.max_examples, or "
            "give more documents"
        )
    return sorted(distances), sorted(horizons)


def _notes(grid: Grid, most: int) -> Iterator[str]:
    """What a user should know of the examples, of which some cell could use `most` test anchors."""
    for (distance, horizon), count in grid.empty.items():
        yield (
            f"distance {distance}, horizon {horizon} is empty: {count:,} test examples, and in some "
            f"split fewer than {MINIMUM_EXAMPLES}, or {LEAST_SHARED:.0%} of the nearest cell's"
        )
    left = len(grid.examples[TESTED_ON])
    if left < FEW_SHARED * most:
        yield (
            f"all cells share the {left:,} of {most:,} test anchors that distance {max(grid.distances)} and "
            f"horizon {max(grid.horizons)} leave; give far ones a run of their own to keep more"
        )
    target = grid.target
    counts = np.bincount(grid.examples[FITTED_ON].labels[:, 0], minlength=target.classes)
    rare = np.flatnonzero(counts < 2)
    tested = np.isin(grid.examples[TESTED_ON].labels[:, 0], rare)
    if tested.any():
        named = ", ".join(target.names[c] if target.names else str(c) for c in rare[:5])
        yield (
            f"{len(rare):,} of {target.classes:,} classes have fewer than two examples to fit on ({named}"
            f"{', …' if len(rare) > 5 else ''}): no probe can learn them; they stay classes, and count in "
            f"the {tested.sum():,} of {len(tested):,} test examples that have them"
        )


def document_numbers(document: np.ndarray) -> np.ndarray:
    """Numbers the documents of examples `[examples]` from 0, in the order in which they appear."""
    return np.cumsum(np.diff(document, prepend=document[:1]) != 0)
