"""The probe grid: which documents, anchors, distances and horizons, shared by every reader that is compared.

All cells use the same anchors, those that every distance and horizon can use, so that a difference between
two cells is never one of their examples. Distances and horizons that too few anchors can use are empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
"""And so does one that would leave less than this share of the nearest cell's anchors to all."""

LEAST_DOCUMENTS = 20
"""Examples are drawn from no fewer documents than these, if there are so many."""

FEW_SHARED = 0.5
"""Below this share of the anchors that some cell can use, a note says what the farthest distance costs."""


@dataclass(frozen=True)
class Grid:
    """What a grid is measured on.

    Attributes:
        target: What is read.
        distances: Distances that are not empty.
        horizons: Horizons that are not empty.
        examples: For every split its examples, with labels of these horizons.
        empty: Test examples of every distance and horizon that is empty.
        notes: Lines to tell the user.
    """

    target: Target
    distances: tuple[int, ...]
    horizons: tuple[int, ...]
    examples: Mapping[str, Examples]
    empty: Mapping[tuple[int, int], int]
    notes: tuple[str, ...]

    def positions(self, split: str, distance: int) -> np.ndarray:
        """Where probes read at a distance, in `corpus.tokens` `[examples]`."""
        return self.examples[split].anchor - distance

    def labels(self, split: str, horizon: int) -> np.ndarray:
        """Labels at a horizon `[examples]`."""
        return self.examples[split].labels[:, self.horizons.index(horizon)]


def make_grid(corpus: Corpus, settings: ProbeSettings, target: Target, seed: int) -> Grid:
    """Draws the documents, and finds the anchors that all cells share.

    Args:
        corpus: The corpus.
        settings: Distances, horizons, anchors and the most examples.
        target: What is read.
        seed: Of the draw of documents to fit on and to choose on; all test documents are used.

    Raises:
        ProbekitError: A split has no documents, or no cell has enough examples.
    """
    documents = {
        FITTED_ON: _drawn(corpus, FITTED_ON, settings, seed),
        CHOSEN_ON: _drawn(corpus, CHOSEN_ON, settings, seed),
        TESTED_ON: _documents(corpus, TESTED_ON),
    }
    every = {
        split: find_examples(corpus, numbers, target, settings.horizons, settings.anchors)
        for split, numbers in documents.items()
    }
    usable = {split: _usable(corpus, settings, examples) for split, examples in every.items()}
    cells = [(d, h) for d in range(len(settings.distances)) for h in range(len(settings.horizons))]
    alive_d, alive_h, shared = _shared(usable, settings)
    kept = {(d, h) for d in alive_d for h in alive_h}
    if not kept:
        raise ProbekitError(
            f"no distance and horizon has {MINIMUM_EXAMPLES} examples in each of the splits "
            f"{', '.join(documents)}; lower probe.distances or probe.horizons, raise probe.max_examples, or "
            "give more documents"
        )
    shared |= {split: _thinned(shared[split], settings.max_examples) for split in (FITTED_ON, CHOSEN_ON)}
    examples = {split: _selected(every[split], rows, sorted(alive_h)) for split, rows in shared.items()}
    empty = {
        (settings.distances[d], settings.horizons[h]): int(usable[TESTED_ON][:, d, h].sum())
        for d, h in cells
        if (d, h) not in kept
    }
    distances = tuple(settings.distances[d] for d in sorted(alive_d))
    horizons = tuple(settings.horizons[h] for h in sorted(alive_h))
    shared_note = _shared_note(usable, shared, distances, horizons)
    notes = (*_empty_note(empty), *shared_note, *_rare_note(examples, target))
    return Grid(target, distances, horizons, examples, empty, notes)


def _drawn(corpus: Corpus, split: str, settings: ProbeSettings, seed: int) -> np.ndarray:
    """Whole documents of a split in random order, as long as they hold at most `max_examples` anchors.

    But at least `LEAST_DOCUMENTS` or all that there are; their anchors are thinned out later.
    """
    order = np.random.default_rng(seed).permutation(_documents(corpus, split))
    ends = corpus.document_sentences if settings.anchors == "sentence" else corpus.document_tokens
    # The first sentence is no anchor, as nothing is before it; a document without any has none.
    anchors = np.cumsum(np.maximum(ends[order + 1] - ends[order] - 1, 0))
    return order[: max(LEAST_DOCUMENTS, int((anchors <= settings.max_examples).sum()))]


def _thinned(rows: np.ndarray, most: int) -> np.ndarray:
    """Every n-th of the chosen rows `[examples]`, bool, so that at most as many as asked for are left."""
    chosen = np.flatnonzero(rows)
    thinned = np.zeros_like(rows)
    thinned[chosen[:: max(1, -(-len(chosen) // most))]] = True
    return thinned


def _documents(corpus: Corpus, split: str) -> np.ndarray:
    documents = corpus.documents(split)
    if not len(documents):
        raise ProbekitError(
            f"the corpus keeps no documents in the split {split!r}; build it with a corpus.{split}_fraction "
            "above 0"
        )
    return documents


def _usable(corpus: Corpus, settings: ProbeSettings, examples: Examples) -> np.ndarray:
    """Which anchors each distance and horizon can use `[examples, distances, horizons]`, bool."""
    near = np.stack([reached(corpus, examples, distance) for distance in settings.distances], axis=1)
    return near[:, :, None] & (examples.labels != NO_LABEL)[:, None, :]


def _shared(
    usable: Mapping[str, np.ndarray], settings: ProbeSettings
) -> tuple[set[int], set[int], dict[str, np.ndarray]]:
    """Distances and horizons that are not empty, by number, and the anchors that all of them can use.

    The farthest distance gives way until enough anchors are left, then the farthest horizon.
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
        return set(), set(), {}
    rows = {
        split: np.asarray(part[:, distances][:, :, horizons].all((1, 2))) for split, part in usable.items()
    }
    return set(distances), set(horizons), rows


def _selected(examples: Examples, rows: np.ndarray, horizons: list[int]) -> Examples:
    chosen = examples[rows]
    return Examples(chosen.document, chosen.anchor, chosen.sentence, chosen.labels[:, horizons])


def _empty_note(empty: Mapping[tuple[int, int], int]) -> list[str]:
    return [
        f"distance {distance}, horizon {horizon} is empty: {count:,} test examples, and in some "
        f"split fewer than {MINIMUM_EXAMPLES}, or {LEAST_SHARED:.0%} of the nearest cell's"
        for (distance, horizon), count in empty.items()
    ]


def _shared_note(
    usable: Mapping[str, np.ndarray],
    shared: Mapping[str, np.ndarray],
    distances: tuple[int, ...],
    horizons: tuple[int, ...],
) -> list[str]:
    most, left = usable[TESTED_ON].any((1, 2)).sum(), shared[TESTED_ON].sum()
    if left >= FEW_SHARED * most:
        return []
    return [
        f"all cells share the {left:,} of {most:,} test anchors that distance {max(distances)} and horizon "
        f"{max(horizons)} leave; give far ones a run of their own to keep more"
    ]


def _rare_note(examples: Mapping[str, Examples], target: Target) -> list[str]:
    counts = np.bincount(examples[FITTED_ON].labels[:, 0], minlength=target.classes)
    rare = np.flatnonzero(counts < 2)
    tested = np.isin(examples[TESTED_ON].labels[:, 0], rare)
    if not len(rare) or not tested.any():
        return []
    named = ", ".join(target.names[c] if target.names else str(c) for c in rare[:5])
    return [
        f"{len(rare):,} of {target.classes:,} classes have fewer than two examples to fit on ({named}"
        f"{', …' if len(rare) > 5 else ''}): no probe can learn them; they stay classes, and count in the "
        f"{tested.sum():,} of {len(tested):,} test examples that have them"
    ]
