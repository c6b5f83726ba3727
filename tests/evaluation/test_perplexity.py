"""Losses by document against one forward pass for each token, by a plain Hugging Face model."""

import numpy as np
import pytest
import torch
from torch.nn.functional import softmax

from probekit.config import VariantName
from probekit.data.windows import cut_windows
from probekit.evaluation.perplexity import EvaluationPass, own_losses
from probekit.models.backends import BridgeBackend
from probekit.models.language_model import bridge, new_model
from probekit.models.locations import layer_of
from probekit.models.mixing import VARIANTS, Fixed, Mixing, Oracle
from probekit.models.planned_lm import PlannedLM
from probekit.progress import Progress
from probekit.run.run import Run

DOCUMENTS = 3


def scoring(run: Run, documents: np.ndarray, window: int, stride: int, batch_size: int = 8) -> EvaluationPass:
    windows = cut_windows(run.corpus, documents, window, stride)
    return EvaluationPass(run.corpus, windows, batch_size, "float32", torch.device("cpu"))


def losses(scored: EvaluationPass, model: PlannedLM, mixing: Mixing) -> np.ndarray:
    with Progress(quiet=True).task("score") as task:
        return scored.document_losses(own_losses(model), mixing, task)[0]


def loud(model: PlannedLM) -> PlannedLM:
    """The model with an adapter that cannot be overheard."""
    if model.adapter is not None:
        model.adapter.projections.data *= 300
    return model


def context_of(token: int, window: int, stride: int) -> int:
    """Where the inputs begin from which a document's token, counted from 1, is predicted."""
    stop = window
    while stop < token:
        stop += stride
    return stop - window


def action_embeddings(run: Run, model: PlannedLM, document: int, choice: str) -> torch.Tensor:
    """The embedding that conditions each sentence of a document, by the definition of each choice."""
    own = slice(*run.corpus.document_sentences[document : document + 2])
    sentences = torch.tensor(run.corpus.embeddings[own])
    rows = []
    for j in range(len(sentences)):
        # The planner is shown the sentences before j, and nothing that it may not see.
        shown = torch.cat([sentences[:j], torch.full((1, sentences.shape[1]), 9.0)])
        scores = model.planner(shown[None])[0, j]
        rows.append(
            {
                "constant": model.adapter.codebook[0],
                "most probable": model.adapter.codebook[scores.argmax()],
                "mixed": softmax(scores, dim=0) @ model.adapter.codebook,
                "true": model.adapter.codebook[int(run.corpus.actions[own][j])],
            }[choice]
        )
    return torch.stack(rows)


@torch.no_grad()
def slow_losses(
    run: Run, model: PlannedLM, documents: np.ndarray, window: int, stride: int, choice: str | None
):
    """One pass of the plain model for every token, with its window's earlier tokens alone."""
    plain, corpus = run.plain_model().eval(), run.corpus
    added: dict[int, torch.Tensor] = {}
    if choice is not None:
        for i, layer in enumerate(map(layer_of, model.adapter.names)):
            plain.transformer.h[layer].attn.c_proj.register_forward_pre_hook(
                lambda module, inputs, i=i: (inputs[0] + added[i],)
            )
    sums = []
    for document in documents:
        start, stop = corpus.document_tokens[document : document + 2].tolist()
        first_token = corpus.first_token[corpus.sentences(np.array([document]))]
        if choice is not None:
            embeddings = action_embeddings(run, model, document, choice)
        total = 0.0
        for token in range(1, stop - start):
            begin = start + context_of(token, window, stride)
            inputs = torch.tensor(corpus.tokens[begin : start + token].astype(np.int64))
            if choice is not None:
                # A position carries the action of the sentence that holds the next token.
                carried = [int((first_token <= p + 1).sum()) - 1 for p in range(begin, start + token)]
                for i in range(len(model.adapter.names)):
                    added[i] = embeddings[carried] @ model.adapter.projections[i]
            log_p = plain(inputs[None]).logits[0, -1].double().log_softmax(dim=0)
            total -= log_p[int(corpus.tokens[start + token])].item()
        sums.append(total)
    return sums


@pytest.mark.parametrize(
    ("variant", "mixing", "choice", "window", "stride"),
    [
        ("none", Fixed(), None, 48, 24),
        ("none", Fixed(), None, 7, 3),
        ("fixed", Fixed(), "constant", 20, 20),
        ("oracle", Oracle(), "true", 20, 7),
        ("oracle", VARIANTS["oracle"].evaluation, "most probable", 30, 15),
        ("joint", VARIANTS["joint"].evaluation, "mixed", 20, 1),
    ],
)
def test_losses_equal_a_pass_for_each_token(
    tiny_run: Run, variant: VariantName, mixing: Mixing, choice: str | None, window: int, stride: int
):
    documents = tiny_run.corpus.documents("test")[:DOCUMENTS]
    model = loud(tiny_run.model(variant))
    found = losses(scoring(tiny_run, documents, window, stride), model, mixing)
    expected = slow_losses(tiny_run, model, documents, window, stride, choice)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    alone = losses(scoring(tiny_run, documents, window, stride), tiny_run.model("none"), Fixed())
    assert (np.abs(found / alone - 1).min() > 1e-3) == (variant != "none")


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_losses_do_not_depend_on_the_batch(tiny_run: Run, batch_size: int):
    documents = tiny_run.corpus.documents("test")
    model, mixing = loud(tiny_run.model("soft")), VARIANTS["soft"].evaluation
    found = losses(scoring(tiny_run, documents, 30, 11, batch_size), model, mixing)
    np.testing.assert_allclose(found, losses(scoring(tiny_run, documents, 30, 11), model, mixing), rtol=1e-5)


def test_windows_that_hold_whole_documents_give_the_plain_models_own_loss(tiny_run: Run):
    corpus = tiny_run.corpus
    documents = corpus.documents("test")
    plain = new_model(tiny_run.config.lm.model_copy(update={"positions": 256}), corpus.tokenizer, 0).eval()
    expected = []
    for document in documents:
        ids = torch.tensor(corpus.tokens[slice(*corpus.document_tokens[document : document + 2])].astype(int))
        with torch.no_grad():
            expected.append(plain(ids[None], labels=ids[None]).loss.item() * (len(ids) - 1))
    model = PlannedLM(BridgeBackend(bridge(plain, corpus.tokenizer, "plain")), tiny_run.planner(), None, 1.0)
    found = losses(scoring(tiny_run, documents, 256, 100), model, Fixed())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_same_tokens_count_whatever_the_window(tiny_run: Run):
    corpus = tiny_run.corpus
    documents = corpus.documents("test")
    tokens = corpus.document_tokens[documents + 1] - corpus.document_tokens[documents] - 1
    for window, stride in [(48, 48), (48, 24), (13, 1), (2, 2), (1, 1)]:
        scored = scoring(tiny_run, documents, window, stride)
        assert scored.documents.tolist() == documents.tolist()
        assert scored.tokens.tolist() == tokens.tolist()
