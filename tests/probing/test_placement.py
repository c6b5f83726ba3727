"""Where examples are read: windows, batches of them, chunks of documents, and one copy of the LM."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.models.backends import BridgeBackend, HFBackend
from probekit.probing import activations
from probekit.probing.activations import (
    ActivationReader,
    Placement,
    batches,
    probing_windows,
)
from probekit.probing.targets import Examples, find_examples, find_target, reached
from probekit.run.run import Run


@pytest.mark.parametrize(("window", "length"), [(None, 48), (20, 20), (7, 7)])
def test_windows_of_a_new_lm_are_those_it_was_trained_in(tiny_run: Run, window: int | None, length: int):
    run = tiny_run.with_settings({"probe.window": window})
    assert probing_windows(run) == (length, length // 2, False)


def test_windows_of_a_pretrained_lm_are_as_long_as_its_positions(tiny_run: Run):
    loaded = {"lm.name": str(tiny_run.folder / "lm"), "training.window": 16}
    run = Run(tiny_run.folder, tiny_run.config.override(loaded))
    assert probing_windows(run) == (48, 24, False)


def test_windows_overlap_by_a_constant(tiny_run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activations, "CONTEXT", 5)
    assert probing_windows(tiny_run) == (48, 43, False)
    with pytest.raises(ProbekitError, match=r"probe\.window is 49, but the LM reads at most 48 positions"):
        probing_windows(tiny_run.with_settings({"probe.window": 49}))


def test_what_fits_the_window_is_read_once(tiny_run: Run, monkeypatch: pytest.MonkeyPatch):
    """No token is read twice, and none after the last example of a document."""
    corpus = tiny_run.corpus
    documents = np.arange(10, 40)
    examples = find_examples(corpus, documents, find_target(corpus, "action"), (1,))
    in_first_window = examples.start <= corpus.document_tokens[examples.document] + 48
    examples = examples[np.flatnonzero(reached(corpus, examples, 3) & in_first_window)]
    read_tokens: list[Tensor] = []
    call = HFBackend.__call__

    def counted(self: HFBackend, tokens: Tensor, *given: Any) -> None:
        read_tokens.append(tokens)
        call(self, tokens, *given)

    reader = ActivationReader(tiny_run, "none", [("hook_resid_post", 1)], (1, 3))
    monkeypatch.setattr(HFBackend, "__call__", counted)
    done: list[int] = []
    list(reader.chunks(examples, done.append))
    last = {document: examples.start[examples.document == document].max() for document in documents}
    needed = sum(last[document] - corpus.document_tokens[document] for document in documents)
    assert sum(done) == reader.size(examples) == needed
    padded = sum(tokens.numel() for tokens in read_tokens)
    assert needed <= padded <= needed / activations.LEAST_FILLED


@given(st.lists(st.integers(1, 3000), max_size=80), st.integers(1, 5000))
def test_batches_hold_windows_of_like_length(lengths: list[int], tokens: int):
    length, found = np.array(lengths, np.int64), []
    for rows in batches(length, tokens):
        longest = length[rows].max()
        assert len(rows) == 1 or len(rows) * longest <= tokens
        assert length[rows].min() >= activations.LEAST_FILLED * longest
        found += rows.tolist()
    assert sorted(found) == list(range(len(length)))


def test_placement_leaves_out_what_nobody_asks_about(tiny_run: Run):
    corpus = tiny_run.corpus
    document = int(np.argmax(np.diff(corpus.document_tokens)))
    begin, end = corpus.document_tokens[document : document + 2].tolist()
    assert end - begin > 30
    anchor = np.array([begin + 6, end - 1])
    examples = Examples.of_tokens(np.full(2, document), anchor, anchor, anchor[:, None])
    place = Placement.of(corpus, examples, (1, 4), 10, 4)
    start, length = place.windows.start.tolist(), place.windows.length.tolist()
    assert (start[0], length[0]) == (begin, 6)  # up to the position before the first anchor
    assert start[-1] + length[-1] == end - 1
    assert len(start) <= 3
    assert not len(place.summed.into)
    pieces = place.single[np.argsort(place.single.into)]
    assert pieces.into.tolist() == [0, 1, 2, 3]
    assert (pieces.end == pieces.begin + 1).all()
    read = place.windows.start[pieces.window] + pieces.begin
    np.testing.assert_array_equal(read, np.concatenate([anchor - 1, anchor - 4]))
    np.testing.assert_array_equal(place.tokens_read.ravel(), pieces.end)
    later = place.windows.start[pieces.window] > begin
    assert (pieces.begin[later] >= 10 - 4).all()  # tokens of context


@pytest.mark.parametrize("variant", ["none", "soft"])
def test_a_reader_holds_one_copy_of_the_lm(tiny_run: Run, variant: str, copies: Callable[[], int]):
    """Also where only TransformerLens has a hook, and the variant's adapter is at one that both have."""
    run = Run.open(tiny_run.folder)
    reader = ActivationReader(run, variant, [("attn.hook_q", 1)], [1])
    assert isinstance(reader._forward, BridgeBackend)
    assert copies() == 1


def test_a_chunk_of_one_long_document_keeps_to_the_limit(tiny_run: Run, monkeypatch: pytest.MonkeyPatch):
    reader = ActivationReader(Run.open(tiny_run.folder), "none", [("hook_resid_post", 1)], [1, 2])
    row = 2 * 32 * 4
    for fitting, most in ((40, 40), (12, 12), (2, 12)):  # windows of 48 tokens are read four times at most
        monkeypatch.setitem(activations.CHUNK_BYTES, "cpu", fitting * row)
        assert reader.chunk_examples == (fitting, most)
