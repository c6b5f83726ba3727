"""The planner's stage: its loss, its dropout, and the documents that it leaves out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from small_trainings import QUIET, base_lm, first_loss, mean_action_loss, one_step, trainer
from torch import Tensor

from probekit.config import Config, PlannerStageSettings
from probekit.data.build import write_corpus
from probekit.data.corpus import Corpus, action_table
from probekit.data.windows import IGNORE, beginnings, collate, cut_windows
from probekit.errors import ProbekitError
from probekit.evaluation.baselines import count_labels, planner_log_probabilities
from probekit.models.planner import Planner
from probekit.run.run import Run
from probekit.training.adapter import AdapterTraining
from probekit.training.planner import PlannerLoss, train_planner

WORDS = [
    "red", "blue", "old", "new", "king", "ship", "town", "river", "grew",
    "fell", "stood", "near", "by", "great", "small", "long", "wide", "green",
]  # fmt: skip


def test_the_planners_loss_is_the_mean_over_all_sentences(tiny_run: Run):
    stage, rows = trainer(tiny_run, **one_step("planner", planner__dropout=0.0))
    trained = train_planner(stage)
    centroids = torch.from_numpy(tiny_run.corpus.codebook.centroids)
    untrained = Planner(stage.config.planner, centroids, tiny_run.config.seed).eval()
    corpus = tiny_run.corpus
    expected = mean_action_loss(corpus, untrained, corpus.documents("train"))
    assert first_loss(rows) == pytest.approx(expected, rel=1e-5)
    expected = mean_action_loss(corpus, trained, corpus.documents("validation"))
    assert rows[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert not trained.training


def test_the_planners_dropout_is_on_in_training_alone(tiny_run: Run):
    losses = []
    for dropout in (0.0, 0.5):
        stage, rows = trainer(tiny_run, **one_step("planner", planner__dropout=dropout))
        train_planner(stage)
        losses.append((first_loss(rows), rows[-1]["validation_loss"]))
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-4)
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-4)


def test_the_planners_dropout_is_on_again_after_each_validation(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
):
    forward, modes = Planner.forward, []

    def recording(self: Planner, embeddings: Tensor) -> Tensor:
        modes.append(self.training)
        return forward(self, embeddings)

    monkeypatch.setattr(Planner, "forward", recording)
    settings = {"training__planner__epochs": 3}
    stage, _ = trainer(tiny_run, **(one_step("planner") | settings))
    train_planner(stage)
    assert modes == [True, False] * 3


@pytest.fixture(scope="module")
def short_documents(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus in which a third of the documents has one sentence."""
    return read_corpus(tiny_run.config, tmp_path_factory.mktemp("short"), [1, 3, 5] * 20)


def read_corpus(config: Config, folder: Path, lengths: list[int], wordless: int = 0) -> Corpus:
    """A corpus of documents with so many sentences each, and an emoji in place of the `wordless`-th."""
    rng = np.random.default_rng(0)

    def sentence(number: int) -> str:
        return "🎉🎉" if number == wordless else " ".join(rng.choice(WORDS, 6)).capitalize() + " there."

    lines = [json.dumps({"text": "\n".join(map(sentence, range(1, length + 1)))}) for length in lengths]
    (folder / "documents.jsonl").write_text("\n".join(lines), "utf-8")
    config = config.override(
        {
            "corpus.reader": "jsonl",
            "corpus.path": str(folder / "documents.jsonl"),
            "corpus.probe_fraction": 0.0,
            "actions.labels": "clusters",
        }
    )
    return write_corpus(config, folder / "corpus", QUIET)


def test_documents_of_one_sentence_are_left_out_of_the_planners_targets(
    tiny_run: Run, short_documents: Corpus
):
    corpus = short_documents
    assert corpus.facts["one_sentence_documents"] == 20
    stage, rows = trainer(tiny_run, corpus, **one_step("planner", planner__dropout=0.0))
    trained = train_planner(stage)
    centroids = torch.from_numpy(corpus.codebook.centroids)
    untrained = Planner(stage.config.planner, centroids, tiny_run.config.seed).eval()
    lengths = np.diff(corpus.document_sentences)
    for planner, split, found in (
        (untrained, "train", first_loss(rows)),
        (trained, "validation", rows[-1]["validation_loss"]),
    ):
        documents = corpus.documents(split)
        longer = documents[lengths[documents] > 1]
        assert 0 < len(longer) < len(documents)
        assert found == pytest.approx(mean_action_loss(corpus, planner, longer), rel=1e-5)
        assert found != pytest.approx(mean_action_loss(corpus, planner, documents), rel=1e-4)


def test_a_corpus_of_single_sentences_is_refused(tiny_run: Run, tmp_path: Path):
    stage, _ = trainer(tiny_run, read_corpus(tiny_run.config, tmp_path, [1] * 40))
    with pytest.raises(ProbekitError, match="split 'train' have one sentence"):
        train_planner(stage)


@pytest.fixture(scope="module")
def wordless_sentences(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus in which a third of the sentences is emoji, which have no action."""
    return read_corpus(tiny_run.config, tmp_path_factory.mktemp("wordless"), [4, 4, 2] * 20, wordless=3)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_sentences_without_an_action_are_no_targets(
    tiny_run: Run, wordless_sentences: Corpus, temperature: float
):
    corpus = wordless_sentences
    assert corpus.facts["sentences_without_action"] == (~corpus.with_action).sum() == 40
    settings = one_step("planner", planner__dropout=0.0)
    stage, rows = trainer(tiny_run, corpus, **settings, training__planner__target_temperature=temperature)
    train_planner(stage)
    centroids = torch.from_numpy(corpus.codebook.centroids)
    planner = Planner(stage.config.planner, centroids, tiny_run.config.seed).eval()
    documents, losses = corpus.documents("train"), []
    for document in documents:
        own = np.arange(*corpus.document_sentences[document : document + 2])
        with torch.no_grad():
            log_p = (
                planner(torch.from_numpy(np.array(corpus.embeddings[own]))[None])[0].double().log_softmax(-1)
            )
        for row, sentence in zip(log_p.numpy(), own, strict=True):
            if corpus.with_action[sentence] and temperature:
                losses.append(-(softmax(-distances(corpus, [sentence])[0] / temperature) * row).sum())
            elif corpus.with_action[sentence]:
                losses.append(-row[corpus.actions[sentence]])
    assert first_loss(rows) == pytest.approx(np.mean(losses), rel=1e-5)


def test_sentences_without_an_action_have_no_cluster_and_are_no_example_of_one(wordless_sentences: Corpus):
    corpus = wordless_sentences
    assert (np.linalg.norm(corpus.codebook.centroids, axis=1) > 0.3).all()
    shown = action_table(corpus, nearest=100)
    assert not any("🎉" in text for texts in shown.nearest for text in texts)
    train = corpus.sentences(corpus.documents("train"))
    assert shown.sentences.sum() == corpus.with_action[train].sum() < len(train)
    assert shown.share.sum() == pytest.approx(1)


def test_counting_baselines_pass_over_sentences_without_an_action(wordless_sentences: Corpus):
    corpus = wordless_sentences
    pairs, later = count_labels(corpus, np.arange(60), corpus.known_actions, corpus.k)
    expected_pairs, expected = np.zeros_like(pairs), np.zeros_like(later)
    for document in range(60):
        first, stop = corpus.document_sentences[document : document + 2]
        for sentence in range(first, stop):
            if corpus.with_action[sentence]:
                known = sentence > first and corpus.with_action[sentence - 1]
                before = corpus.actions[sentence - 1] if known else corpus.k
                expected_pairs[before, corpus.actions[sentence]] += 1
                expected[corpus.actions[sentence]] += sentence > first
    np.testing.assert_array_equal(pairs, expected_pairs)
    np.testing.assert_array_equal(later, expected)
    sentences = np.arange(len(corpus.first_token))
    np.testing.assert_array_equal(corpus.known_actions == -1, ~corpus.with_action)
    behind = np.flatnonzero(~corpus.with_action[:-1]) + 1
    assert (corpus.previous_actions(sentences)[behind] == -1).all()


def test_the_planner_predicts_every_sentence_with_an_action_or_without(
    tiny_run: Run, wordless_sentences: Corpus
):
    corpus = wordless_sentences
    planner = Planner(tiny_run.config.planner, torch.from_numpy(corpus.codebook.centroids), 0).eval()
    found = planner_log_probabilities(planner, corpus, np.arange(60), batch_size=7)
    assert len(found) == len(corpus.first_token)
    last = slice(*corpus.document_sentences[-2:])
    alone = planner(torch.from_numpy(np.array(corpus.embeddings[last]))[None])[0].log_softmax(-1)
    np.testing.assert_allclose(found[last], alone.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_sentences_that_begin_in_a_batch_are_those_with_an_action(wordless_sentences: Corpus):
    corpus = wordless_sentences
    windows = cut_windows(corpus, np.arange(60), 16, 8)
    begun = beginnings(corpus, windows)
    assert begun.sum() == corpus.with_action.sum()
    batches = [collate(corpus, windows[np.array([number])]) for number in range(len(windows))]
    assert [int(batch.begins.sum()) for batch in batches] == begun.tolist()


# Soft targets


def distances(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """Squared distances of sentences' embeddings to all centroids, written out `[sentences, actions]`."""
    embeddings = corpus.embeddings[rows].astype(np.float64)
    return ((embeddings[:, None] - corpus.codebook.centroids) ** 2).sum(-1)


def soft_loss(corpus: Corpus, planner: Planner, documents: np.ndarray, temperature: float) -> float:
    """Mean over sentences of the cross-entropy against a softmax over negative squared distances."""
    total, count = 0.0, 0
    for document in documents:
        rows = np.arange(*corpus.document_sentences[document : document + 2])
        with torch.no_grad():
            scores = planner(torch.from_numpy(np.array(corpus.embeddings[rows]))[None])[0].double()
        targets = softmax(-distances(corpus, rows) / temperature, axis=-1)
        total -= (targets * scores.log_softmax(-1).numpy()).sum()
        count += len(rows)
    return total / count


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_soft_targets_are_a_softmax_over_negative_squared_distances(tiny_run: Run, temperature: float):
    settings = {
        "training__planner__target_temperature": temperature,
        "planner__dropout": 0.0,
    }
    stage, rows = trainer(tiny_run, **one_step("planner", **settings))
    trained = train_planner(stage)
    corpus = tiny_run.corpus
    untrained = Planner(stage.config.planner, torch.from_numpy(corpus.codebook.centroids), stage.config.seed)
    expected = soft_loss(corpus, untrained.eval(), corpus.documents("train"), temperature)
    assert first_loss(rows) == pytest.approx(expected, rel=1e-5)
    expected = soft_loss(corpus, trained, corpus.documents("validation"), temperature)
    assert rows[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    # The planner's own loss in joint training is the same one.
    own = []
    for weight in (0, 1):
        stage, rows = trainer(
            tiny_run, **one_step("adapter", training__joint__planner_loss_weight=weight, **settings)
        )
        AdapterTraining(stage, "joint", base_lm(tiny_run), tiny_run.planner()).run()
        own.append(first_loss(rows))
    expected = soft_loss(corpus, tiny_run.planner(), corpus.documents("train"), temperature)
    assert own[1] - own[0] == pytest.approx(expected, rel=1e-4)


def test_the_colder_soft_targets_are_the_nearer_to_hard_ones(short_documents: Corpus):
    # Actions are clusters there, that is, nearest centroids.
    corpus = short_documents
    codebook = torch.from_numpy(corpus.codebook.centroids)
    embeddings = torch.from_numpy(np.array(corpus.embeddings))
    actions = torch.from_numpy(corpus.actions.astype(np.int64))
    scores = torch.randn(len(actions), corpus.k, generator=torch.Generator().manual_seed(0))
    hard = PlannerLoss(PlannerStageSettings(), codebook)(scores, actions, embeddings).item()
    near = []
    for temperature in (1.0, 0.1, 0.01, 1e-6, 1e-30):
        settings = PlannerStageSettings(target_temperature=temperature)
        loss = PlannerLoss(settings, codebook)
        torch.testing.assert_close(loss.soft_targets(embeddings).sum(-1), torch.ones(len(actions)))
        near.append(abs(loss(scores, actions, embeddings).item() - hard))
    assert near[0] > 1e-3 * hard
    assert near[-2:] == pytest.approx([0, 0], abs=1e-4 * hard)
    targets = loss.soft_targets(embeddings)
    torch.testing.assert_close(targets, torch.nn.functional.one_hot(actions, corpus.k).float())


def test_padding_is_no_target(short_documents: Corpus):
    codebook = torch.from_numpy(short_documents.codebook.centroids)
    loss = PlannerLoss(PlannerStageSettings(target_temperature=0.1), codebook)
    scores, actions = torch.randn(4, len(codebook)), torch.tensor([0, IGNORE, 1, IGNORE])
    embeddings = torch.randn(4, codebook.shape[1])
    whole, two = loss(scores, actions, embeddings), loss(scores[::2], actions[::2], embeddings[::2])
    torch.testing.assert_close(whole, two)
