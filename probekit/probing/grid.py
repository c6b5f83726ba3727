"""The grid of probes: its cells, and the examples that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from probekit.config import Position, ProbeSettings, SolverName
from probekit.data.corpus import Corpus
from probekit.errors import ProbekitError
from probekit.probing.results import ScoredExamples
from probekit.probing.targets import Examples, Ranges, Target, find_examples, labelled, reached

FITTED_ON, CHOSEN_ON, TESTED_ON = "probe", "validation", "test"
"""The splits that probes use; none of them trained the LM or the planner."""

MINIMUM_EXAMPLES = 20
"""A cell with fewer examples in any of its splits stays empty."""

LEAST_SHARED = 0.1
"""A position or horizon is left out if it would leave all cells less than this share of the examples that the
best reached cell has."""

LEAST_DOCUMENTS = 20
"""Examples are drawn from this many documents at least, if there are so many."""

LARGEST_SHARE = 0.8
"""A class with a larger share of the test examples is named in a note."""

FEW_SHARED = 0.5
"""Below this share of the examples that some cell can use, a note says what the least reached one costs."""


LENSES: frozenset[SolverName] = frozenset({"logit-lens", "tuned-lens"})
"""Solvers that are the LM's own head."""


@dataclass(frozen=True)
class Grid:
    """The examples of a grid.

    Attributes:
        target: What is predicted.
        positions: Positions that are not empty.
        horizons: Horizons that are not empty.
        examples: For every split its examples, with labels of these horizons.
        empty: Number of test examples of every position and horizon that is empty.
        notes: Lines to show the user.
    """

    target: Target
    positions: tuple[Position, ...]
    horizons: tuple[int, ...]
    examples: Mapping[str, Examples]
    empty: Mapping[tuple[Position, int], int]
    notes: tuple[str, ...]

    def labels(self, split: str, horizon: int) -> np.ndarray:
        """Labels at a horizon `[examples]`."""
        return self.examples[split].labels[:, self.horizons.index(horizon)]

    def tested(self) -> ScoredExamples:
        """The test examples."""
        labels = {horizon: self.labels(TESTED_ON, horizon) for horizon in self.horizons}
        group = pd.factorize(self.examples[TESTED_ON].group)[0]
        centres = {}
        if self.target.kind == "vectors":
            centres = {h: self.target.mean(self.labels(FITTED_ON, h)) for h in self.horizons}
        return ScoredExamples(self.target, group, labels, centres)


def make_grid(corpus: Corpus, settings: ProbeSettings, target: Target, seed: int) -> Grid:
    """Draws documents, and finds the examples that all cells share.

    Args:
        corpus: The corpus.
        settings: Positions, horizons, anchors and the largest number of examples.
        target: What is predicted.
        seed: Seed of the draw of documents to fit on and to choose on; all test documents are used.

    Raises:
        ProbekitError: A split has no documents, no cell has enough examples, or a solver cannot read numbers.
    """
    check_solvers(target, settings)
    positions = settings.positions or target.positions
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
            documents = _drawn(corpus, documents, target, settings, positions, seed)
        every[split] = find_examples(corpus, documents, target, settings.horizons, settings.anchors)
        near = [reached(corpus, every[split], position) for position in positions]
        known = labelled(every[split].labels)
        usable[split] = np.stack(near, axis=1)[:, :, None] & known[:, None, :]

    by_reach, h_kept = _filled(usable, settings)
    if not by_reach:
        raise ProbekitError(_too_few(every, usable, positions, settings))
    p_kept = sorted(by_reach)
    examples = {}
    for split, whole in every.items():
        rows = np.flatnonzero(usable[split][:, p_kept][:, :, h_kept].all((1, 2)))
        if split != TESTED_ON:  # of a few long documents every n-th example
            rows = rows[:: max(1, -(-len(rows) // settings.max_examples))]
        kept = whole[rows]
        examples[split] = replace(kept, labels=kept.labels[:, h_kept])
    if target.names and len(fitted := np.unique(examples[FITTED_ON].labels)) < 2:
        name = target.names[int(fitted[0])]
        raise ProbekitError(
            f"all {len(examples[FITTED_ON]):,} examples to fit on are of the class {name!r} of "
            f"{target.name!r}; give documents of other classes to the split 'probe'"
        )
    grid = Grid(
        target,
        tuple(positions[p] for p in p_kept),
        tuple(settings.horizons[h] for h in h_kept),
        examples,
        empty={
            (position, horizon): int(usable[TESTED_ON][:, p, h].sum())
            for p, position in enumerate(positions)
            for h, horizon in enumerate(settings.horizons)
            if p not in p_kept or h not in h_kept
        },
        notes=(),
    )
    most = int(usable[TESTED_ON].any((1, 2)).sum())
    return replace(grid, notes=tuple(_notes(grid, most, positions[by_reach[-1]])))


def check_solvers(target: Target, settings: ProbeSettings) -> None:
    """Refuses solvers that read classes where the target holds others, and lenses of anything but tokens."""
    other = [name for name in settings.locations if not name.startswith("hook_resid_")]
    lenses = [solver for solver in settings.solvers if solver in LENSES]
    if lenses and (target.tokens is None or other):
        wrong = (
            f"probe.target is {target.name!r}"
            if target.tokens is None
            else f"probe.locations has {other[0]!r}"
        )
        raise ProbekitError(
            f"probe.solvers has {lenses[0]}, which reads tokens from the residual stream, but {wrong}; give "
            "probe.target token and probe.locations hook_resid_post"
        )
    classifiers = [solver for solver in settings.solvers if solver != "ridge"]
    if target.kind != "classes" and classifiers:
        raise ProbekitError(
            f"probe.solvers has {', '.join(classifiers)}, which read classes, and {target.name!r} holds "
            f"{target.kind}; give probe.solvers ridge"
        )


def _drawn(
    corpus: Corpus,
    documents: np.ndarray,
    target: Target,
    settings: ProbeSettings,
    positions: Sequence[Position],
    seed: int,
) -> np.ndarray:
    """Documents in random order, as long as they hold `max_examples` examples at most.

    But at least `LEAST_DOCUMENTS`, or all that there are; their examples are thinned out later.
    """
    order = np.random.default_rng(seed).permutation(documents)
    # Nothing is before the first sentence, so where something before is read, it is no example.
    before = any(isinstance(position, int) and position > 0 for position in positions)
    unread = before and not isinstance(target.labels, Ranges)
    examples = np.cumsum(target.example_counts(corpus, settings.anchors, first=not unread)[order])
    return order[: max(LEAST_DOCUMENTS, int((examples <= settings.max_examples).sum()))]


def _filled(usable: Mapping[str, np.ndarray], settings: ProbeSettings) -> tuple[list[int], list[int]]:
    """Numbers of the positions, those that most examples reach first, and horizons that are not empty.

    The position that fewest examples reach is dropped until enough are left to all, then the farthest
    horizon. None are left where no cell has enough.

    Args:
        usable: By split, whether each position and horizon can use each example, bool
            `[examples, positions, horizons]`.
        settings: The horizons.
    """
    horizons = sorted(range(len(settings.horizons)), key=settings.horizons.__getitem__)
    reach = sum(part.any(axis=2).sum(axis=0) for part in usable.values())
    positions = np.argsort(-reach, kind="stable").tolist()

    def examples(part: np.ndarray, positions: list[int], horizons: list[int]) -> int:
        return int(part[:, positions][:, :, horizons].all((1, 2)).sum())

    wanted = {
        split: max(MINIMUM_EXAMPLES, LEAST_SHARED * examples(part, positions[:1], horizons[:1]))
        for split, part in usable.items()
    }

    def enough(positions: list[int], horizons: list[int]) -> bool:
        return all(examples(part, positions, horizons) >= wanted[split] for split, part in usable.items())

    while len(positions) > 1 and not enough(positions, horizons[:1]):
        positions.pop()
    while len(horizons) > 1 and not enough(positions, horizons):
        horizons.pop()
    return (positions, sorted(horizons)) if enough(positions, horizons) else ([], [])


def _too_few(
    every: Mapping[str, Examples],
    usable: Mapping[str, np.ndarray],
    positions: Sequence[Position],
    settings: ProbeSettings,
) -> str:
    """What is short where no cell has enough examples, and the setting that helps."""
    counts, unread = [], False
    for split, examples in every.items():
        known = int(labelled(examples.labels).any(axis=1).sum())
        read = int(usable[split].any(axis=2).sum(axis=0).max())
        unread |= read < MINIMUM_EXAMPLES <= known
        counts.append(
            f"{split} has {known:,} with a label in {len(np.unique(examples.document)):,} documents, "
            f"{read:,} of them read"
        )
    remedy = (
        "label more, give more documents, or begin another --out with other corpus.probe_fraction, "
        "corpus.validation_fraction and corpus.test_fraction"
    )
    if unread:
        remedy = (
            f"position {', '.join(map(str, positions))} is outside most texts: give nearer probe.positions, "
            "or last, mean or first"
        )
    elif len(settings.horizons) > 1 or settings.horizons != (1,):
        remedy += ", or lower probe.horizons"
    shown = ", ".join(counts)
    return f"no position and horizon has {MINIMUM_EXAMPLES} examples in each split: {shown}; {remedy}"


def _notes(grid: Grid, most: int, least: Position) -> Iterator[str]:
    """What a user should know of the examples, of which some cell could use `most` test examples.

    Args:
        grid: The grid.
        most: How many test examples some cell could use.
        least: The position that fewest examples reach.
    """
    for (position, horizon), count in grid.empty.items():
        yield (
            f"position {position}, horizon {horizon} is empty: {count:,} test examples, and in some "
            f"split fewer than {MINIMUM_EXAMPLES}, or {LEAST_SHARED:.0%} of the best reached cell's"
        )
    left = len(grid.examples[TESTED_ON])
    if left < FEW_SHARED * most:
        yield (
            f"all cells share the {left:,} of {most:,} test examples that position {least} and "
            f"horizon {max(grid.horizons)} leave; give far ones a run of their own to keep more"
        )
    tested = grid.tested()
    for horizon in grid.horizons:
        yield from _label_notes(tested, horizon)
    target = grid.target
    if target.kind != "classes":
        return
    counts = np.bincount(grid.examples[FITTED_ON].labels[:, 0], minlength=target.classes)
    rare = np.flatnonzero(counts < 2)
    rarely = np.isin(grid.examples[TESTED_ON].labels[:, 0], rare)
    if rarely.any():
        named = ", ".join(map(target.name_of, rare[:5]))
        yield (
            f"{len(rare):,} of {target.classes:,} classes have fewer than two examples to fit on ({named}"
            f"{', …' if len(rare) > 5 else ''}): no probe can learn them; they stay classes, and count in "
            f"the {rarely.sum():,} of {len(rarely):,} test examples that have them"
        )


def _label_notes(tested: ScoredExamples, horizon: int) -> Iterator[str]:
    """What the test labels of a horizon cannot show."""
    labels, target = tested.labels[horizon], tested.target
    found, counts = np.unique(labels, return_counts=True)
    most = found[counts.argmax()]
    named = target.name_of(most) if target.kind == "classes" else f"{most:g}"
    if len(found) == 1:
        yield (
            f"all {len(labels):,} test examples at horizon {horizon} have the label {named}: nothing can be "
            "told of what probes read, and nothing has an interval; give more documents, or a larger "
            "corpus.test_fraction"
        )
    elif target.kind == "classes" and counts.max() > LARGEST_SHARE * len(labels):
        yield (
            f"{counts.max() / len(labels):.0%} of the test examples at horizon {horizon} have the class "
            f"{named}, and so much accuracy means nothing: see the balanced accuracy, of which "
            f"{1 / len(found):.2f} is chance, and the bits"
        )
