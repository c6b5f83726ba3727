"""What is written after one activation follows from it alone, and is measured against the true text."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from running import Capture, printed, refused

from probekit.causal import continuation as module
from probekit.causal.continuation import LOCATION, Ahead, ContinuationResults, continuation
from probekit.errors import ProbekitError
from probekit.models.decoding import new_decoder, window_start
from probekit.models.locations import hook_name
from probekit.planted.ceilings import position_ceiling
from probekit.probing.probe import probe
from probekit.probing.record import read_probe_record
from probekit.probing.targets import NO_LABEL
from probekit.run.run import Run

FEW = {"continuation.boundaries": 12, "continuation.tokens": 10, "evaluation.resamples": 100}


@pytest.fixture(scope="module")
def run(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose probes read the embeddings of the next two sentences."""
    folder = shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("continued") / "run")
    ridge = {"probe.target": "embedding", "probe.positions": [1], "probe.horizons": [1, 2]}
    few = {"probe.control": False, "probe.code_length": False, "evaluation.resamples": 100}
    probe(folder, ridge | few, quiet=True)
    return Run.open(folder)


@pytest.fixture(scope="module")
def results(run: Run) -> ContinuationResults:
    return continuation(run, FEW, quiet=True)


def short(run: Run) -> np.ndarray:
    """Second sentences of test documents, before which all tokens are read in one window."""
    first = run.corpus.document_sentences[run.corpus.documents("test")] + 1
    begins = run.corpus.document_tokens[run.corpus.document_of(first)]
    return first[run.corpus.first_token[first] - begins < 40]


def test_activations_are_those_of_the_token_before_each_sentence(run: Run):
    sentence = short(run)[::-1].copy()
    found = module._activations(run, sentence)
    writer = module._Writer(run, sentence)
    names = [hook_name(LOCATION, layer) for layer in found]
    backend = run.backend_for(names)
    for row, context in enumerate(writer.contexts()):
        seen: list[torch.Tensor] = []
        backend(torch.tensor([context]), [(name, seen.append) for name in names], len(names))
        for layer, values in zip(found, seen, strict=True):
            torch.testing.assert_close(found[layer][row], values[0, -1], rtol=1e-4, atol=1e-5)


def test_the_last_layer_gives_the_first_token_that_the_context_gives(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    run = run.with_settings({"continuation.tokens": 1})
    sentence = short(run)
    writer, last = module._Writer(run, sentence), run.frozen_lm().layers - 1
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(module, "draw", lambda logits, *_: drawn.append(logits) or logits.argmax(-1))

    def logits(*given: Any) -> torch.Tensor:
        drawn.clear()
        writer.write(*given)
        order = np.argsort([len(context) for context in given[0]], kind="stable")
        return torch.cat(drawn).softmax(-1)[np.argsort(order)]

    put = {hook_name(LOCATION, last): module._activations(run, sentence)[last]}
    with_context = logits(writer.contexts())
    torch.testing.assert_close(logits(writer.empty, put), with_context, rtol=1e-3, atol=1e-6)
    other = {name: values.roll(1, 0) for name, values in put.items()}
    assert (logits(writer.empty, other) / with_context - 1).nan_to_num().abs().max() > 0.02


@pytest.mark.parametrize("cache", [True, False])
def test_the_empty_contexts_own_activations_change_nothing(
    run: Run, cache: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "new_decoder", partial(new_decoder, cache=cache))
    run, sentence = run.with_settings({"continuation.tokens": 8, "generation.temperature": 2.0}), short(run)
    writer = module._Writer(run, sentence)
    assert writer._decoder.cached == cache
    names = [hook_name(LOCATION, layer) for layer in range(run.frozen_lm().layers)]
    seen: list[torch.Tensor] = []
    run.backend_for(names)(torch.tensor(writer.empty), [(name, seen.append) for name in names], len(names))
    own = {name: values[:, 1] for name, values in zip(names, seen, strict=True)}
    nothing = writer.write(writer.empty)
    assert writer.write(writer.empty, own) == nothing
    assert writer.write(writer.empty, {name: -values for name, values in own.items()}) != nothing


def test_an_lm_that_reads_no_separator_reads_one_here(run: Run, monkeypatch: pytest.MonkeyPatch):
    usual = module._Writer(run, short(run)).empty
    monkeypatch.setattr(type(run.corpus), "bos_rule", "none")
    separator = run.corpus.separator
    assert module._Writer(run, short(run)).empty == [[separator, *tokens] for tokens in usual]
    assert all(tokens[0] == separator and len(tokens) == 2 for tokens in usual)


@pytest.mark.parametrize("bos", ["document", "none"])
def test_no_window_moves_while_tokens_are_written(run: Run, bos: str, monkeypatch: pytest.MonkeyPatch):
    """In the 48 positions of the LM: the activation would be put on a token that was written."""
    monkeypatch.setattr(type(run.corpus), "bos_rule", bos)
    first = len(module._Writer(run, short(run)).empty[0])
    last = first + 47 - 1  # the last token is written, but not read
    assert window_start(first, 48, bos) == window_start(last, 48, bos) < window_start(last + 1, 48, bos)
    said = "continuation.tokens is 48, but the LM reads 48 tokens at once, the two before them included; "
    with pytest.raises(ProbekitError, match=f"^{said}give at most 47$"):
        continuation(run, {"continuation.tokens": 48}, quiet=True)
    with pytest.raises(ProbekitError, match=r"continuation\.horizons has 500"):  # what is looked at next
        continuation(run, {"continuation.tokens": 47, "continuation.horizons": [500]}, quiet=True)


@pytest.mark.parametrize("count", [2, 3, 60])
def test_every_boundary_gives_its_activation_to_another(count: int):
    drawn = [module._donors(count, seed).tolist() for seed in range(40)]
    for donors in drawn:
        assert sorted(donors) == list(range(count))
        assert all(donor != row for row, donor in enumerate(donors))
    assert drawn[0] == module._donors(count, 0).tolist()
    neighbours = np.mean([(np.abs(np.array(own) - range(count)) == 1).mean() for own in drawn])
    assert neighbours == pytest.approx(2 / count, abs=0.02)


def test_one_boundary_alone_has_no_other_document(run: Run, monkeypatch: pytest.MonkeyPatch):
    document = run.corpus.documents("test")[:1]
    monkeypatch.setattr(type(run.corpus), "documents", lambda self, split: document)
    with pytest.raises(ProbekitError, match="only one test document has a sentence boundary"):
        module._drawn(run.with_settings(FEW))


def test_what_no_boundary_fits_names_the_setting_of_this_command(run: Run, monkeypatch: pytest.MonkeyPatch):
    nothing = np.full(len(run.corpus.actions), NO_LABEL)
    monkeypatch.setitem(vars(run.corpus), "known_actions", nothing)
    with pytest.raises(ProbekitError, match=r"no test document has .*; lower continuation\.horizons$"):
        module._drawn(run.with_settings(FEW))


@pytest.mark.parametrize("other", [{"probe.anchors": "token"}, {"probe.labels": "labels.csv"}, {}])
def test_ridge_maps_are_probes_of_the_embeddings_of_sentences(
    run: Run, other: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """Not those at every token, nor those of a column of the table of labels that is called so."""
    config = read_probe_record(run.folder).config.override(other)
    monkeypatch.setattr(module, "read_probe_record", lambda folder: SimpleNamespace(config=config))
    sentence = short(run)
    found = module._ridge_maps(run, module._activations(run, sentence), [0], Ahead.of(run, sentence))
    assert bool(found) == (not other)


def test_metrics_of_true_sentences_and_of_others(run: Run):
    sentence = short(run)
    ahead, corpus = Ahead.of(run, sentence), run.corpus
    pairs = zip(corpus.sentence_texts(sentence), corpus.sentence_texts(sentence + 1), strict=True)
    found = ahead.of_texts([list(pair) for pair in pairs])
    nearest = corpus.codebook.nearest(corpus.embeddings[sentence + 1])
    for metric, expected in (
        ("cosine", np.ones(len(sentence))),
        ("rouge2", [len(text.split()) > 1 for text in corpus.sentence_texts(sentence + 1)]),
        ("true_action", nearest == corpus.actions[sentence + 1]),
    ):
        np.testing.assert_allclose(found[2][metric][0], expected, atol=1e-5)
    none = ahead.of_texts([[text] for text in corpus.sentence_texts(sentence)])[2]
    assert all((values == 0).all() for values, _ in none.values())
    rolled = corpus.embeddings[np.roll(sentence, 1)]
    centred = [part - corpus.embeddings[corpus.sentences(corpus.documents("train"))].mean(0) for part in
               (rolled, corpus.embeddings[sentence])]  # fmt: skip
    expected = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*centred, strict=True)]
    np.testing.assert_allclose(ahead.of_embeddings(rolled, 1)["cosine"][0], expected, atol=1e-5)


def test_the_table_has_every_condition_and_its_paired_differences(run: Run, results: ContinuationResults):
    table, layers = results.table, run.frozen_lm().layers
    counts = table[table.metric == "true_action"].groupby(["condition", "horizon"]).size()
    expected = {"context": 1, "nothing": 1, "ceiling": 1, "ridge map": layers}
    expected |= dict.fromkeys(("activation", "other document"), layers + 1)
    for condition, number in expected.items():
        assert counts.loc[condition].tolist() == [number, number]
    keys = ["horizon", "metric"]
    value = table.set_index(["condition", "layer", *keys]).value.sort_index()
    for metric in ("cosine", "true_action", "rouge2"):
        own = value.loc["activation", 1, 2, metric]
        for name, row in {"other": ("other document", 1), "nothing": ("nothing", pd.NA)}.items():
            (other,) = table[
                (table.condition == row[0])
                & (table.layer.isna() if row[1] is pd.NA else table.layer == row[1])
                & (table.horizon == 2)
                & (table.metric == metric)
            ].value
            difference = value.loc["activation", 1, 2, f"{metric}_over_{name}"]
            assert difference == pytest.approx(own - other, abs=1e-9)
    assert set(table.documents) == {12}
    assert (table.value_low <= table.value + 1e-9).all()
    pd.testing.assert_frame_equal(run.continuation(), table)


def test_the_ceiling_is_the_exact_posteriors_accuracy(run: Run, results: ContinuationResults):
    written = results.written
    for horizon in (1, 2):
        own = written[(written.condition == "context") & (written.horizon == horizon)]
        true = own.sentence.to_numpy()
        positions = run.corpus.first_token[true - horizon + 1] - 1
        best = position_ceiling(run.config, run.corpus, positions, true).argmax(1)
        table = results.table[(results.table.condition == "ceiling") & (results.table.horizon == horizon)]
        assert table.value.tolist() == [(best == run.corpus.actions[true]).mean()]
        assert (run.corpus.document_of(true) == own.document).all()
        assert list(own["true"]) == run.corpus.sentence_texts(true)


def test_the_same_seed_writes_the_same(run: Run, results: ContinuationResults):
    again = continuation(run, FEW | {"evaluation.batch_size": 5}, quiet=True)
    assert (again.written.written == results.written.written).mean() > 0.98  # batches round differently
    other = continuation(run, FEW | {"seed": 1, "continuation.layers": [0]}, quiet=True)
    assert set(other.written.sentence) != set(results.written.sentence)


def test_the_command_shows_each_sentence_ahead(capsys: Capture, run: Run):
    words = [word for name, value in FEW.items() for word in (f"--{name}", str(value))]
    out = printed(capsys, "continuation", run.folder, *words, "--continuation.layers", "0", "--quiet")
    assert "the true sentence 1 ahead" in out
    assert "the true sentence 2 ahead" in out
    assert "other document" in out
    assert "12 test documents" in out


def test_without_probes_of_embeddings_a_note_says_how_to_fit_them(copy: Path):
    found = continuation(copy, FEW | {"continuation.layers": [1], "continuation.tokens": 2}, quiet=True)
    assert "ridge map" not in set(found.table.condition)
    assert any("--target embedding --positions 1" in note for note in found.notes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"continuation.layers": [3]}, "continuation.layers has 3, but the LM's layers are 0 to 2"),
        ({"continuation.horizons": [500]}, "continuation.horizons has 500, but no test document"),
    ],
)
def test_what_does_not_fit(run: Run, settings: dict[str, list[int]], said: str):
    with pytest.raises(ProbekitError, match=said):
        continuation(run, FEW | settings, quiet=True)


def test_a_number_of_tokens_that_is_none(capsys: Capture, run: Run):
    assert "continuation.tokens is '0'" in refused(
        capsys, "continuation", run.folder, "--continuation.tokens", "0"
    )
