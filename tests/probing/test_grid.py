"""The grid against walking through every anchor: what all cells share, what is empty, what the notes say."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from bare_corpora import bare_corpus
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from probekit.config import NAMED, Position, ProbeSettings
from probekit.data.corpus import SPLITS, Corpus
from probekit.errors import ProbekitError
from probekit.probing import grid as grid_module
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, MINIMUM_EXAMPLES, TESTED_ON, Grid, make_grid
from probekit.probing.targets import NO_LABEL, Target, find_examples, find_target
from probekit.run.run import Run

USED = (FITTED_ON, CHOSEN_ON, TESTED_ON)


def grid_of(corpus: Corpus, seed: int = 0, target: Target | None = None, **settings: Any) -> Grid:
    return make_grid(corpus, ProbeSettings(**settings), target or find_target(corpus, "action"), seed)


def walk(corpus: Corpus, split: str, settings: ProbeSettings) -> dict[int, set[tuple[Position, int]]]:
    """For every anchor of a split the cells that can use it; documents of any size are drawn."""
    found = {}
    action = find_target(corpus, "action")
    for document in np.flatnonzero(corpus.split == SPLITS.index(split)):
        examples = find_examples(corpus, np.array([document]), action, settings.horizons, settings.anchors)
        text = range(int(corpus.document_tokens[document]) + 1, int(corpus.document_tokens[document + 1]))
        for anchor, labels in zip(examples.start.tolist(), examples.labels, strict=True):
            found[anchor] = {
                (position, horizon)
                for position in settings.positions
                for horizon, label in zip(settings.horizons, labels, strict=True)
                if (isinstance(position, str) or anchor - position in text) and label != NO_LABEL
            }
    return found


def slow_grid(corpus: Corpus, settings: ProbeSettings, least: int) -> tuple[list[Position], list[int], dict]:
    """Positions, horizons and shared anchors of each split, by the rule in words.

    The position that fewest anchors reach gives way until enough are left, then the farthest horizon.
    """
    usable = {split: walk(corpus, split, settings) for split in USED}

    def shared(positions: list[Position], horizons: list[int]) -> dict[str, set[int]]:
        cells = {(position, horizon) for position in positions for horizon in horizons}
        return {
            split: {anchor for anchor, can in anchors.items() if cells <= can}
            for split, anchors in usable.items()
        }

    every = [{position for position, _ in cells} for can in usable.values() for cells in can.values()]
    reach = Counter(position for positions in every for position in positions)
    near, soon = sorted(settings.positions, key=lambda p: -reach[p]), sorted(settings.horizons)
    nearest = shared(near[:1], soon[:1])

    def enough(positions: list[Position], horizons: list[int]) -> bool:
        left = shared(positions, horizons)
        return all(len(left[split]) >= max(least, len(nearest[split]) / 10) for split in USED)

    kept = [near[:n] for n in range(len(near), 0, -1) if enough(near[:n], soon[:1])]
    if not kept:
        return [], [], {}
    horizons = next(soon[:n] for n in range(len(soon), 0, -1) if enough(kept[0], soon[:n]))
    return (
        [p for p in settings.positions if p in kept[0]],
        [h for h in settings.horizons if h in horizons],
        shared(kept[0], horizons),
    )


DOCUMENT = st.tuples(st.sampled_from(USED), st.lists(st.integers(1, 5), max_size=6))


@hypothesis_settings(max_examples=200)
@given(
    st.lists(DOCUMENT, min_size=3, max_size=14),
    st.lists(st.integers(-6, 12) | st.sampled_from(NAMED), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True),
    st.sampled_from(["start", "token"]),
    st.integers(1, 6),
    st.integers(0, 5),
)
def test_the_grid_is_what_walking_gives(documents, positions, horizons, anchors, least: int, seed: int):
    corpus = bare_corpus([*documents, *((split, [2, 1, 3]) for split in USED)])
    settings = ProbeSettings(positions=positions, horizons=horizons, anchors=anchors)
    kept, soon, shared = slow_grid(corpus, settings, least)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_module, "MINIMUM_EXAMPLES", least)
        if not shared:
            with pytest.raises(ProbekitError, match=f"no position and horizon has {least} examples"):
                make_grid(corpus, settings, find_target(corpus, "action"), seed)
            return
        grid = make_grid(corpus, settings, find_target(corpus, "action"), seed)
    assert (list(grid.positions), list(grid.horizons)) == (kept, soon)
    assert list(grid.examples) == list(USED)
    for split, examples in grid.examples.items():
        assert set(examples.start.tolist()) == shared[split]
        assert len(examples) == len(shared[split]) >= least
        again = find_examples(corpus, np.unique(examples.document), grid.target, soon, anchors)
        row = {anchor: n for n, anchor in enumerate(again.start.tolist())}
        for name in ("document", "sentence", "labels"):
            values = getattr(again, name)[[row[anchor] for anchor in examples.start.tolist()]]
            assert np.array_equal(getattr(examples, name), values)
        assert NO_LABEL not in examples.labels
        for n, horizon in enumerate(soon):
            assert np.array_equal(grid.labels(split, horizon), examples.labels[:, n])
    cells = [(p, h) for p in positions for h in horizons if p not in kept or h not in soon]
    tested = walk(corpus, TESTED_ON, settings)
    assert grid.empty == {cell: sum(cell in can for can in tested.values()) for cell in cells}


# Which documents


def split_of(corpus: Corpus, documents: np.ndarray) -> set[str]:
    return {SPLITS[number] for number in corpus.split[documents]}


@pytest.mark.parametrize("anchors", ["start", "token"])
def test_a_document_is_in_one_split_and_the_test_has_all_of_its_own(tiny_run: Run, anchors: str):
    corpus = tiny_run.corpus
    grid = grid_of(corpus, anchors=anchors)
    documents = {split: np.unique(examples.document) for split, examples in grid.examples.items()}
    for split, numbers in documents.items():
        assert split_of(corpus, numbers) == {split}
        assert numbers.tolist() == corpus.documents(split).tolist()


@pytest.mark.parametrize("anchors", ["start", "token"])
@pytest.mark.parametrize("most", [40, 60, 100])
def test_at_most_so_many_examples_by_whole_documents(
    tiny_run: Run, anchors: str, most: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grid_module, "LEAST_DOCUMENTS", 1)
    corpus = tiny_run.corpus
    most *= 1 if anchors == "start" else 12
    grid = grid_of(corpus, anchors=anchors, max_examples=most, positions=[1])
    whole = grid_of(corpus, anchors=anchors, positions=[1])
    for split in (FITTED_ON, CHOSEN_ON):
        counts = Counter(whole.examples[split].document.tolist())
        drawn = Counter(grid.examples[split].document.tolist())
        assert sum(drawn.values()) <= most
        assert drawn == {document: counts[document] for document in drawn}
        left = set(counts) - set(drawn)
        first_tokens = len(drawn) + 1 if anchors == "token" else 0  # drawn, though nothing is before them
        assert not left or sum(drawn.values()) + max(counts[n] for n in left) + first_tokens > most
    assert np.array_equal(grid.examples[TESTED_ON].start, whole.examples[TESTED_ON].start)


def test_few_long_documents_give_examples_spread_over_all():
    corpus = bare_corpus([(split, [3] * 100) for split in USED for _ in range(6)])
    grid = grid_of(corpus, positions=[1], max_examples=50)
    for split in (FITTED_ON, CHOSEN_ON):
        examples = grid.examples[split]
        assert len(examples) <= 50
        counts = Counter(examples.document.tolist())
        assert len(counts) == 6
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len(grid.examples[TESTED_ON]) == 6 * 99


def test_seeds_draw_different_documents_and_the_same_seed_the_same(tiny_run: Run):
    grids = [grid_of(tiny_run.corpus, seed, max_examples=40, positions=[1, 2]) for seed in (0, 0, 1, 2)]
    for split in (FITTED_ON, CHOSEN_ON):
        same, again, *others = (grid.examples[split].start.tolist() for grid in grids)
        assert same == again
        for other in others:
            assert {*other} != {*same}
    tested = [grid.examples[TESTED_ON].start.tolist() for grid in grids]
    assert tested == [tested[0]] * 4


# Notes


def test_empty_cells_are_noted(tiny_run: Run):
    grid = grid_of(tiny_run.corpus, positions=[1, 500, 2], horizons=[90, 1])
    assert (grid.positions, grid.horizons) == ((1, 2), (1,))
    assert grid.empty == {(1, 90): 0, (500, 90): 0, (500, 1): 0, (2, 90): 0}
    noted = [note for note in grid.notes if "is empty" in note]
    assert noted == [
        f"position {d}, horizon {h} is empty: 0 test examples, and in some split fewer than "
        f"{MINIMUM_EXAMPLES}, or 10% of the best reached cell's"
        for d, h in grid.empty
    ]


def test_the_price_of_a_far_distance_is_noted():
    """Documents of five sentences of four tokens: distance 13 reaches back from the last one alone."""
    corpus = bare_corpus([(split, [4] * 5) for split in USED for _ in range(30)])
    assert grid_of(corpus, positions=[1, 8]).notes == ()
    (note,) = grid_of(corpus, positions=[13, 1]).notes
    assert note.startswith("all cells share the 30 of 120 test examples that position 13 and horizon 1 leave")


@pytest.mark.parametrize("named", [False, True])
def test_classes_that_nobody_can_learn_are_noted(named: bool):
    corpus = bare_corpus([(split, [3] * 5) for split in USED for _ in range(30)])
    fitted = np.flatnonzero(corpus.split[corpus.document_of(np.arange(450))] == SPLITS.index(FITTED_ON))
    codes = np.arange(450) % 2
    codes[fitted[1]] = 2  # one to fit on
    codes[-3:] = 3  # none to fit on, three to test
    codes[-4] = 2
    names = ("a", "b", "rare", "unseen") if named else ()

    def labels(start: np.ndarray, sentence: np.ndarray, horizon: int) -> np.ndarray:
        return codes[sentence]

    target = Target("kind", 4, labels, codes, names)
    (note,) = grid_of(corpus, target=target, positions=[1]).notes
    assert note.startswith("2 of 4 classes have fewer than two examples to fit on")
    assert ("(rare, unseen)" if named else "(2, 3)") in note
    assert "the 4 of 120 test examples that have them" in note
    codes[-4:] = 0  # rare, but nobody is asked
    assert grid_of(corpus, target=target, positions=[1]).notes == ()


# What is refused


@pytest.mark.parametrize("name", ["positions", "horizons"])
def test_nothing_left_is_refused_with_what_is_short_and_what_to_change(tiny_run: Run, name: str):
    with pytest.raises(ProbekitError, match=f"has {MINIMUM_EXAMPLES} examples in each") as caught:
        grid_of(tiny_run.corpus, **{name: [500]})
    line = str(caught.value)
    assert "\n" not in line
    assert f"probe.{name}" in line
    labelled = "0" if name == "horizons" else r"\d+"
    for split in USED:
        assert re.search(rf"{split} has {labelled} with a label in \d+ documents, 0 of them read", line)


@pytest.mark.parametrize("split", USED)
def test_a_split_without_documents_is_named(split: str):
    corpus = bare_corpus([(other, [3] * 5) for other in USED if other != split for _ in range(30)])
    with pytest.raises(ProbekitError, match=f"no documents in the split '{split}'") as caught:
        grid_of(corpus)
    assert f"corpus.{split}_fraction" in str(caught.value)
