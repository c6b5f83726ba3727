"""Newly written sentences: how tokens are drawn, where sentences end, and which action they have."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from probekit.causal.boundaries import Edit, EditedLM, draw_boundaries
from probekit.causal.writing import MAX_TOKENS, Judge, SentenceWriter
from probekit.data.encoders import WORD
from probekit.data.sentences import complete_spans
from probekit.data.tokenizer import decoded
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import NO_ACTION
from probekit.models.conditioning import CONDITIONINGS, new_adapter
from probekit.models.locations import hook_name
from probekit.probing.targets import NO_LABEL
from probekit.run.run import Run

WINDOW = 48
POINT = ("hook_resid_post", 0)


def edited_lm(run: Run, variant: str, count: int = 8) -> EditedLM:
    corpus = run.corpus
    boundaries = draw_boundaries(corpus, corpus.actions, corpus.documents("test"), count, WINDOW, 3, 0)
    return EditedLM(run, variant, boundaries, [POINT])


@pytest.fixture(scope="module")
def written(probed_run: Run) -> tuple[EditedLM, SentenceWriter, list[np.ndarray]]:
    lm = edited_lm(probed_run, "none")
    writer = SentenceWriter(lm, 8, WINDOW)
    return lm, writer, writer.write(np.arange(8), None)


@pytest.mark.parametrize("edited", [False, True])
def test_tokens_depend_on_the_boundarys_number_and_edits_stay_at_the_boundary(
    edited: bool, probed_run: Run, written
):
    lm, writer, texts = written
    added = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    if edited:
        plain, texts = texts, writer.write(np.arange(8), Edit(POINT, (1, 3), lambda x, n, d: x + added / d))
        assert not all(np.array_equal(a, b) for a, b in zip(plain, texts, strict=True))
    model, boundaries, corpus = probed_run.plain_model().eval(), lm.boundaries, probed_run.corpus
    special = torch.tensor(corpus.tokenizer.all_special_ids)
    for n, text in enumerate(texts):
        uniforms = np.random.default_rng([0, n]).random(MAX_TOKENS)
        start = boundaries.windows.start[n]
        tokens = corpus.tokens[start : corpus.first_token[boundaries.sentence[n]]].astype(np.int64).tolist()
        boundary = len(tokens)

        def change(module: Any, inputs: Any, output: Any, boundary: int = boundary) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for distance in (1, 3):
                hidden[0, boundary - distance] += added / distance
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = model.transformer.h[0].register_forward_hook(change) if edited else None
        for step, token in enumerate(text):
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1].double()
            logits[special] = -torch.inf
            reached = logits.softmax(-1).cumsum(-1)
            assert token == int((reached > uniforms[step] * reached[-1]).to(torch.int8).argmax())
            tokens.append(int(token))
        if handle:
            handle.remove()


def test_texts_end_with_the_sentence(probed_run: Run, written):
    _, writer, texts = written
    assert any(len(text) < writer.max_tokens for text in texts)
    for n, text in enumerate(texts):
        context = writer.context(n)

        def finished(tokens: np.ndarray, context: np.ndarray = context) -> int:
            """Sentences that are complete with the tokens, less those that are without."""
            texts = (decoded(probed_run.corpus.tokenizer, part) for part in ([*context, *tokens], context))
            whole, before = (len(complete_spans(text)) for text in texts)
            return whole - before

        assert finished(text) == 1 or len(text) == writer.max_tokens
        assert all(finished(text[:length]) <= 0 for length in range(1, len(text)))


def test_actions_are_the_nearest_centroids(probed_run: Run, written):
    _, writer, texts = written
    corpus = probed_run.corpus
    found = writer.labels()
    whole = [n for n, text in enumerate(texts) if len(text) < writer.max_tokens]
    sentences = [decoded(corpus.tokenizer, texts[n]).strip() for n in whole]
    expected = corpus.codebook.nearest(probed_run.encoder().encode(sentences))
    np.testing.assert_array_equal(found[whole], expected)


def test_the_judge_knows_sentences_by_their_words(probed_run: Run):
    corpus = probed_run.corpus
    texts = corpus.sentence_texts(np.arange(len(corpus.first_token)))
    words = [set(WORD.findall(text.lower())) for text in texts]
    common = Counter(word for own in words for word in own).most_common(9)[-1][0]
    labels = np.array([3 if common in own else 5 for own in words])
    labels[::7] = NO_LABEL
    judge = Judge(corpus, labels)
    unlabelled = np.arange(0, len(labels), 7)
    expected = [3 if common in words[n] else 5 for n in unlabelled]
    assert np.mean(judge([texts[n] for n in unlabelled]) == expected) > 0.9
    assert judge([f"The {common}.", "?!"]).tolist() == [3, NO_ACTION]
    assert "validation sentences its accuracy is 0.9" in judge.note or "is 1.000" in judge.note
    with pytest.raises(ProbekitError, match="fewer than two labels"):
        Judge(corpus, np.full(len(labels), 2))


@pytest.mark.parametrize("kind", sorted(CONDITIONINGS))
def test_every_kind_of_conditioning_reads_a_growing_text_as_the_true_one(kind: str, probed_run: Run):
    lm = edited_lm(probed_run, "soft", 4)
    if kind != probed_run.config.conditioning.kind:
        run = probed_run.with_settings({"conditioning.kind": kind})
        centroids = torch.from_numpy(run.corpus.codebook.centroids)
        adapter = new_adapter(run.config.conditioning, centroids, run.frozen_lm(), 0)
        lm.model.adapter = adapter.requires_grad_(False)
        lm.use_hooks([hook_name(*POINT)])
    boundaries, rows = lm.boundaries, np.arange(4)
    true = lm.read(boundaries.windows[rows])
    writer = SentenceWriter(lm, 4, WINDOW)
    texts, applied = writer.growing_texts(rows, Edit(POINT, (2,), lambda x, n, d: 2 * x))
    whole = lm.predict(true, rows, Edit(POINT, (2,), lambda x, n, d: 2 * x))[0]
    for step in range(int((boundaries.last - boundaries.column).min()) + 1):
        with torch.no_grad():
            grown = writer.decoder(texts, applied.hooks)
        at = torch.from_numpy(boundaries.column + step)
        torch.testing.assert_close(grown, whole[torch.arange(4), at], atol=1e-4, rtol=1e-4)
        for n, text in enumerate(texts):
            text.tokens.append(int(true.tokens[n, at[n] + 1]))
            text.carried.append(text.carried[-1])
    inserts = lm.model.adapter is not None and lm.model.adapter.inserts
    assert writer.decoder.cached != inserts
