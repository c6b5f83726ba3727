"""Sentences of a text that grows: as the splitter has them for every text so far, and embedded once."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from probekit.data.sentences import complete_spans, sentence_spans
from probekit.data.tokenizer import decoded
from probekit.data.windows import collate, cut_windows
from probekit.models.generation_state import (
    Constant,
    ConstantBySentence,
    GenerationState,
    Given,
    Planned,
    _ends,
)
from probekit.models.mixing import Predicted
from probekit.run.run import Run

TEXT = (
    'He paid 3.14 dollars etc. and left. "Why?" she said. They saw Mr. Smith.\r\n\nA new line '
    "\u2014 caf\u00e9 \U0001f600 naïve. See p. 5! = Title = \n The end"
)


class Counting:
    """An encoder that remembers what it was given."""

    dimensions = 16

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        self.seen += sentences
        rows = [np.random.default_rng(list(s.encode())).normal(size=16) for s in sentences]
        return np.array(rows, dtype=np.float32).reshape(-1, 16)


def ids_of(run: Run, text: str) -> list[int]:
    return run.corpus.tokenizer(text, add_special_tokens=False).input_ids


def start(run: Run, text: str = "", given: list[int] | None = None) -> GenerationState:
    plan = None if given is None else np.array(given)
    return GenerationState([run.corpus.separator, *ids_of(run, text)], run.corpus.tokenizer, "en", plan)


def planned(run: Run) -> tuple[Planned, Counting]:
    model, encoder = run.model("predicted"), Counting()
    return Planned(
        model.adapter, encoder, run.device, model.planner, Predicted(), model.temperature, "float32"
    ), encoder


def test_sentences_are_those_of_the_text_so_far(tiny_run: Run):
    """Bytes that are no whole character yet, and lines that are done with, change nothing."""
    state = start(tiny_run)
    ids = ids_of(tiny_run, TEXT)
    counts = []
    for n, token in enumerate(ids):
        state.text.tokens.append(token)
        state.read()
        text = decoded(tiny_run.corpus.tokenizer, ids[: n + 1])
        assert state.whole == text
        assert state.sentences == [text[a:b].strip() for a, b in complete_spans(text)]
        counts.append(len(state.sentences))
    assert state.whole == TEXT
    assert (np.diff(counts) < 0).any()  # what looked like an end was none
    assert counts[-1] == len(sentence_spans(TEXT)) - 1


def test_positions_of_a_prompt_carry_their_sentence_as_in_training(tiny_run: Run):
    corpus, conditioner = tiny_run.corpus, planned(tiny_run)[0]
    for document in corpus.documents("test")[:5]:
        begin, end = corpus.document_tokens[document : document + 2]
        state = GenerationState(corpus.tokens[begin : end - 1].tolist(), corpus.tokenizer, "en")
        with torch.no_grad():
            conditioner([state])
        batch = collate(corpus, cut_windows(corpus, np.array([document]), end - begin, end - begin))
        carried = np.array(state.text.carried)
        expected = batch.sentence[0, : end - begin - 1].numpy()
        # The last one's sentence is decided before its token is there.
        assert carried[:-1].tolist() == (expected - expected[0])[: len(carried) - 1].tolist()


def test_each_sentence_is_embedded_once(tiny_run: Run):
    conditioner, encoder = planned(tiny_run)
    states = [start(tiny_run), start(tiny_run, "One thing. Two things. And")]
    more = [ids_of(tiny_run, " It goes. On and on. Then more."), ids_of(tiny_run, " three. Four. Five.")]
    with torch.no_grad():
        for step in range(max(map(len, more))):
            conditioner(states)
            for state, ids in zip(states, more, strict=True):
                state.text.tokens += ids[step : step + 1] or ids_of(tiny_run, " a")
        conditioner(states)
    assert len(encoder.seen) == len(set(encoder.seen))
    assert {"One thing.", "Two things.", "And three.", "It goes.", "On and on."} < set(encoder.seen)


def test_a_position_carries_what_the_planner_makes_of_the_sentences_before(tiny_run: Run):
    conditioner, encoder = planned(tiny_run)
    model = tiny_run.model("predicted")
    state = start(tiny_run, "One thing.")
    text = " Two. Or 3.14 things! So it"
    with torch.no_grad():
        for token in ids_of(tiny_run, text):
            conditioner([state])
            so_far = decoded(tiny_run.corpus.tokenizer, state.text.tokens[1:])
            over = [so_far[a:b].strip() for a, b in complete_spans(so_far)]
            context = np.concatenate([encoder.encode(over), np.zeros((1, 16), np.float32)])
            best = model.planner(torch.from_numpy(context)[None])[0, -1].argmax()
            carried = state.text.embeddings[state.text.carried[-1]]
            assert torch.equal(carried, model.adapter.codebook[best])
            assert state.actions[len(over)] == best
            state.text.tokens.append(token)
    assert state.plan == state.actions[1:]
    assert len(state.text.carried) == len(state.text.tokens) - 1


def test_a_given_plan_is_obeyed_also_where_a_sentence_was_none(tiny_run: Run):
    corpus, model = tiny_run.corpus, tiny_run.model("oracle")
    encoder = tiny_run.encoder()
    state = start(tiny_run, "One thing. It cost", [3, 5, 2])
    own = corpus.codebook.nearest(encoder.encode(["One thing."]))[0]
    conditioner = Given(model.adapter, encoder, tiny_run.device, corpus.codebook)
    carried_actions = []
    for token in ids_of(tiny_run, " 3.14 in all. Well. Yes. No."):
        conditioner([state])
        if state.ended:
            break
        carried = state.text.embeddings[state.text.carried[-1]]
        carried_actions.append(int((model.adapter.codebook == carried).all(1).nonzero()[0, 0]))
        state.text.tokens.append(token)
    assert state.ended == "plan"
    assert state.whole == "One thing. It cost 3.14 in all. Well. Yes."
    assert state.actions == [own, 3, 5, 2]
    assert state.plan == [3, 5, 2]
    prompt = model.adapter.codebook[[own, 3]]
    carried = torch.stack([state.text.embeddings[row] for row in state.text.carried])
    first = next(i for i, row in enumerate(carried) if not torch.equal(row, prompt[0]))
    assert decoded(corpus.tokenizer, state.text.tokens[1 : first + 1]).strip() == "One thing."
    changes = [a for a, b in zip(carried_actions, [*carried_actions[1:], -1], strict=True) if a != b]
    assert changes == [3, 5, 3, 5, 2]  # `3.` was taken for an end, until 14 came


def test_constants_are_carried_everywhere():
    class Tokenizer:
        def decode(self, ids: list[int], **_: object) -> str:
            return "x" * len(ids)

    state, row = GenerationState([0, 1, 2], Tokenizer(), "en"), torch.ones(3)
    Constant(row)([state])
    assert (state.text.carried, state.text.embeddings) == ([0, 0, 0], [row])
    state.text.tokens.append(4)
    Constant(row)([state])
    assert state.text.carried == [0] * 4
    assert state.plan == []


def test_constants_by_sentence_change_where_the_corpus_has_a_new_sentence(tiny_run: Run):
    corpus = tiny_run.corpus
    for document in corpus.documents("test")[:5]:
        begin, end = corpus.document_tokens[document : document + 2]
        first = corpus.first_token[slice(*corpus.document_sentences[document : document + 2])]
        cut = first[len(first) // 2]  # a prompt of whole sentences; the rest is written token by token
        state = GenerationState(corpus.tokens[begin:cut].tolist(), corpus.tokenizer, "en")
        for token in [*corpus.tokens[cut : end - 1].tolist(), None]:
            ConstantBySentence(torch.ones(3))([state])
            if token is not None:
                state.text.tokens.append(token)
        carried = np.array(state.text.carried)
        changes = 1 + np.flatnonzero(carried[1:] != carried[:-1])
        # Position t carries the sentence of token t + 1.
        assert changes.tolist() == (first[1:] - begin - 1).tolist()
        assert state.plan == []


def test_ends_of_tokens_are_those_of_all_tokens_before_them(tiny_run: Run):
    """Characters of several tokens, and texts longer than what is decoded at once."""
    ids = ids_of(tiny_run, TEXT * 6)
    assert len(ids) > 200
    tokenizer = tiny_run.corpus.tokenizer
    assert _ends(tokenizer, ids) == [len(decoded(tokenizer, ids[: i + 1])) for i in range(len(ids))]
    assert _ends(tokenizer, []) == []


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\u00e9"])
def test_texts_of_next_to_nothing(text: str, tiny_run: Run):
    state = start(tiny_run, text)
    conditioner, _ = planned(tiny_run)
    with torch.no_grad():
        conditioner([state])
    assert state.first == 0
    assert len(state.actions) == 1
    assert set(state.text.carried) == {0}
    assert len(state.text.carried) == len(state.text.tokens)
