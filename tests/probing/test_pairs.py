"""Pairs of spans: what is read of each is read of the spans alone, and tables of pairs name them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.probing.activations import ActivationReader
from probekit.probing.grid import make_grid
from probekit.probing.labels import target_of
from probekit.probing.probe import probe
from probekit.probing.score import score
from probekit.probing.targets import Examples, Ranges, Target, find_examples, reached
from probekit.probing.transfer import find_values
from probekit.reports.lens import lens
from probekit.run.run import Run

POSITIONS = ("last", "mean", 0, 1)
POINTS = [("hook_resid_post", 0), ("hook_resid_post", 2)]


@pytest.fixture(scope="module")
def table(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two words of every document, and whether the second one is among the first half of all words."""
    rows = []
    generator = np.random.default_rng(0)
    words = sorted({word for document in texts(tiny_run) for word in document.split()})
    for number, text in [*enumerate(texts(tiny_run))] * 4:
        own = text.split()
        one, two = generator.choice(min(20, len(own)), 2, replace=False)
        begins = [len(" ".join(own[:n])) + (n > 0) for n in (one, two)]
        ends = [begin + len(own[n]) for begin, n in zip(begins, (one, two), strict=True)]
        row = {"document": number, "early": words.index(own[two]) < len(words) // 2}
        rows.append(row | dict(zip(("start", "start2", "end", "end2"), (*begins, *ends), strict=True)))
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def texts(run: Run) -> list[str]:
    return [" ".join(document.text.split()) for _, batch in run.corpus.texts.batches() for document in batch]


def target(run: Run, path: Path) -> Target:
    given = {"probe.labels": str(path), "probe.target": "early"}
    return target_of(run.corpus, Config().override(given))


def test_a_table_names_both_spans(tiny_run: Run, table: Path):
    corpus = tiny_run.corpus
    labels = target(tiny_run, table).labels
    assert isinstance(labels, Ranges)
    given = pd.read_csv(table).drop_duplicates()
    places = ["document", "start", "end", "start2", "end2"]
    for number, row in enumerate(given.sort_values(places).itertuples()):
        text = corpus.texts[row.document].text
        for (start, stop), (begin, end) in (
            ((labels.start[number], labels.stop[number]), (row.start, row.end)),
            (labels.second[number], (row.start2, row.end2)),
        ):
            said = corpus.tokenizer.decode(corpus.tokens[start:stop].tolist())
            assert text[begin:end] in said
    assert target(tiny_run, table).spans == 2


def test_activations_are_those_of_both_spans_side_by_side(tiny_run: Run, table: Path):
    corpus = tiny_run.corpus
    pairs = find_examples(corpus, corpus.documents("test"), target(tiny_run, table), [1])
    near = np.all([reached(corpus, pairs, position) for position in POSITIONS], axis=0)
    pairs = pairs[near]
    assert len(pairs) > 5
    (found,) = ActivationReader(tiny_run, "none", POINTS, POSITIONS, spans=2).read(pairs)
    alone = ActivationReader(tiny_run, "none", POINTS, POSITIONS)
    for half, (start, stop) in enumerate(((pairs.start, pairs.stop), pairs.second.T)):
        one = Examples(pairs.document, start, stop, pairs.sentence, pairs.group, pairs.labels)
        (expected,) = alone.read(one)
        width = expected.shape[-1]
        assert found.shape[-1] == 2 * width
        np.testing.assert_allclose(found[..., half * width :][..., :width], expected, atol=1e-4)
        for position in POSITIONS:
            assert (pairs.last_read(position) >= one.last_read(position)).all()
    assert not reached(corpus, pairs, 10_000).any()


def test_a_probe_reads_the_second_span(tiny_run: Run, table: Path, copy: Path, quick_probes: dict):
    run = Run.open(copy)
    settings = quick_probes | {
        "probe.labels": str(table),
        "probe.target": "early",
        "probe.variants": ["none"],
        "probe.locations": ["hook_embed"],
        "probe.positions": ["mean"],
        "probe.l2": [0.001, 0.01],
        "probe.max_iterations": 200,
    }
    pair = probe(run, settings, quiet=True).table.query("reader == 'probe'")
    with pytest.raises(ProbekitError, match="read pairs of spans, of which new texts have none"):
        score(copy, ["a text"], quiet=True)
    with pytest.raises(ProbekitError, match="read pairs of spans, or vectors of a table"):
        lens(copy, "a text", quiet=True)
    alone = table.with_name("alone.csv")
    spans = pd.read_csv(table).drop(columns=["start2", "end2"])
    spans.drop_duplicates(["document", "start"]).to_csv(alone, index=False)
    first = probe(run, settings | {"probe.labels": str(alone)}, quiet=True).table.query("reader == 'probe'")
    assert pair.auroc.item() > 0.9 > first.auroc_high.item() - 0.05
    assert pair.auroc_low.item() > first.auroc.item()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"start2": None}, "'start' or 'start2' is empty, but other rows label pairs of spans"),
        ({"start": None, "end": None}, "'start' or 'start2' is empty"),
        ({"start2": 10**6, "end2": 10**6 + 1}, "'start2' 1000000 and 'end2' 1000001 must be characters"),
    ],
)
def test_halves_of_pairs_are_refused(changed: dict, said: str, tiny_run: Run, table: Path, tmp_path: Path):
    rows = pd.read_csv(table).astype(object)
    for name, value in changed.items():
        rows.loc[0, name] = value
    rows.to_csv(tmp_path / "pairs.csv", index=False)
    with pytest.raises(ProbekitError) as error:
        target(tiny_run, tmp_path / "pairs.csv")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_values_of_transfer_are_those_of_the_pair(tiny_run: Run, table: Path, tmp_path: Path):
    """Pairs that share their first span may have different values."""
    rows = pd.read_csv(table)
    rows = pd.concat([rows, rows.assign(start2=rows.start, end2=rows.end)]).drop_duplicates()
    rows = rows.drop_duplicates(["document", "start", "start2"]).assign(early=lambda r: r.start % 2 == 0)
    rows["same"] = rows.start == rows.start2
    rows.to_csv(tmp_path / "pairs.csv", index=False)
    labels = target(tiny_run, tmp_path / "pairs.csv")
    given = {"probe.labels": str(tmp_path / "pairs.csv"), "probe.target": "early", "probe.transfer": "same"}
    config = Config().override(given)
    grid = make_grid(tiny_run.corpus, config.probe, labels, 0)
    values = find_values(tiny_run.corpus, grid, config)
    assert values.names == ("False", "True")
    for split, examples in grid.examples.items():
        assert values.of[split].tolist() == (examples.start == examples.second[:, 0]).tolist()


def test_tokens_of_pairs_are_refused(tiny_run: Run, table: Path):
    corpus = tiny_run.corpus
    with pytest.raises(ProbekitError, match="labels are of pairs of spans; give start"):
        find_examples(corpus, corpus.documents("test"), target(tiny_run, table), [1], "token")
