"""Labels of any text against those of the corpus, which were found from the same sentences another way."""

import numpy as np
import pytest

from probekit.data.corpus import Corpus
from probekit.evaluation.action_metrics import STRENGTHS
from probekit.generation.evaluate import count_actions
from probekit.generation.metrics import Labeller
from probekit.run.run import Run


@pytest.fixture(scope="module")
def labeller(tiny_run: Run) -> Labeller:
    return Labeller(tiny_run)


def document_tokens(corpus: Corpus, document: int) -> np.ndarray:
    begin, end = corpus.document_tokens[document : document + 2]
    return np.array(corpus.tokens[begin + 1 : end])


def nearest(corpus: Corpus, sentences: np.ndarray) -> list[int]:
    return corpus.codebook.nearest(corpus.embeddings[sentences]).tolist()


def test_whole_documents_have_the_labels_of_their_embeddings(tiny_run: Run, labeller: Labeller):
    corpus = tiny_run.corpus
    documents = corpus.documents("test")
    (cut,) = labeller.cut([document_tokens(corpus, d) for d in documents], [10_000]).values()
    for document, text, actions in zip(documents, cut.texts, cut.actions, strict=True):
        assert text == corpus.texts[document].text
        assert actions.tolist() == nearest(corpus, corpus.sentences(np.array([document])))


def test_a_sentence_counts_where_all_its_tokens_are(tiny_run: Run, labeller: Labeller):
    corpus, lengths = tiny_run.corpus, [1, 7, 20, 21, 22, 23, 24, 60]
    for document in corpus.documents("test")[:6]:
        tokens, begin = document_tokens(corpus, document), corpus.document_tokens[document] + 1
        assert len(tokens) > 60
        sentences = corpus.sentences(np.array([document]))
        ends = np.append(corpus.first_token[sentences[1:]], begin + len(tokens)) - begin
        cuts = labeller.cut([tokens], lengths)
        for length in lengths:
            # Of what is cut at 60 tokens nobody knows whether the last sentence is whole, even where it is.
            whole = (ends < 60).sum() if length == 60 else (ends <= length).sum()
            assert cuts[length].actions[0].tolist() == nearest(corpus, sentences)[: max(whole, 1)]
            assert cuts[length].texts == [corpus.tokenizer.decode(tokens[:length].tolist())]


def test_a_first_sentence_beyond_the_cut_counts_with_all_its_text(tiny_run: Run, labeller: Labeller):
    corpus = tiny_run.corpus
    documents = corpus.documents("test")
    texts = [document_tokens(corpus, d)[:60] for d in documents]
    short = labeller.cut(texts, [2, 60])[2]
    alone = labeller.cut(texts, [2])[2]
    first = [actions.tolist() for actions in short.actions]
    assert first == [nearest(corpus, corpus.sentences(np.array([d]))[:1]) for d in documents]
    assert first != [actions.tolist() for actions in alone.actions]


def test_what_a_context_ends_with_is_not_the_texts(tiny_run: Run, labeller: Labeller):
    corpus, document = tiny_run.corpus, tiny_run.corpus.documents("test")[1]
    sentences, tokens = corpus.sentences(np.array([document])), document_tokens(corpus, document)
    at = corpus.first_token[sentences[3]] - corpus.document_tokens[document] - 1
    (cut,) = labeller.cut([tokens[at:]], [1000], [tokens[:at]]).values()
    assert cut.actions[0].tolist() == nearest(corpus, sentences[3:])
    assert cut.texts[0] == corpus.tokenizer.decode(tokens[at:].tolist())
    assert cut.texts[0].startswith(" ")
    text = corpus.tokenizer.decode(tokens[:at].tolist())
    assert labeller.last_actions([text]).tolist() == nearest(corpus, sentences[2:3])


def test_what_goes_on_with_the_contexts_sentence_counts_by_itself(tiny_run: Run, labeller: Labeller):
    """No sentence begins where no space is, nor at a quotation mark that one ends with."""
    tokenizer, sentences = tiny_run.corpus.tokenizer, tiny_run.corpus.sentences(np.array([0]))[:3]
    first, second, third = tiny_run.corpus.sentence_texts(sentences)
    context, *texts = (
        np.array(tokenizer(text, add_special_tokens=False).input_ids)
        for text in (first, f" {second} {third}", f"{second.lower()} {third}", f'" {second} {third}')
    )
    (cut,) = labeller.cut(texts, [1000], [context] * 3).values()
    assert [actions.tolist() for actions in cut.actions] == [nearest(tiny_run.corpus, sentences[1:])] * 3
    assert cut.merged == [0, 1, 0]


def test_texts_of_nothing_and_of_one_unfinished_sentence(tiny_run: Run, labeller: Labeller):
    words = np.array(tiny_run.corpus.tokenizer(" the and of", add_special_tokens=False).input_ids)
    blank = np.array(tiny_run.corpus.tokenizer(" \n ", add_special_tokens=False).input_ids)
    cuts = labeller.cut([words[:0], words, blank], [2, 5])
    for cut in cuts.values():
        assert cut.empty.tolist() == [True, False, True]
        assert [len(actions) for actions in cut.actions] == [0, 1, 0]
    assert labeller.last_actions(["", "One. Two.", " \n"])[[0, 2]].tolist() == [-1, -1]
    assert labeller.cut([], [5])[5].actions == []


@pytest.mark.parametrize("labels", ["planted", "clusters"])
def test_what_is_counted_is_labelled_like_generated_text(tiny_run: Run, labels: str):
    corpus = tiny_run.corpus
    config = tiny_run.config.override({"actions.labels": labels})
    actions = np.array(corpus.actions if labels == "clusters" else nearest(corpus, slice(None)))
    bigram, shares = count_actions(corpus, config)
    counts, prior, pairs = np.zeros((9, 8)), np.full(8, 0.5), []
    for document in corpus.documents("train"):
        own = actions[corpus.sentences(np.array([document]))]
        np.add.at(counts, ([8, *own[:-1]], own), 1)
        np.add.at(prior, own[1:], 1)
    assert shares == pytest.approx(prior / prior.sum())
    smooth = (counts.sum(0) + 0.5) / (counts.sum(0) + 0.5).sum()
    tables = [np.log((counts + s * smooth) / (counts.sum(1, keepdims=True) + s)) for s in STRENGTHS]
    for document in corpus.documents("validation"):
        own = actions[corpus.sentences(np.array([document]))]
        pairs += list(zip([8, *own[:-1]], own, strict=True))
    losses = [-sum(table[pair] for pair in pairs) for table in tables]
    assert bigram.table == pytest.approx(tables[int(np.argmin(losses))])
    # The two ways of labelling differ: that both measure the same is no coincidence.
    assert (np.array(corpus.actions) == nearest(corpus, slice(None))).mean() < 1
