"""Out-of-fold scores: who has seen what, and that evaluation does not read them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_trainings import base_lm, flat, trainer
from torch import Tensor, nn

from probekit.config import Config
from probekit.data.codebook import Codebook
from probekit.data.corpus import Corpus
from probekit.data.windows import collate, cut_windows
from probekit.errors import ProbekitError
from probekit.io import read_json, read_tensors
from probekit.models.planner import Planner
from probekit.run.run import Run
from probekit.training import planner as planner_stage
from probekit.training.adapter import AdapterTraining
from probekit.training.planner import OutOfFold, fold_of_documents, train_planner
from probekit.training.train import train

FOLDS = 3


class Recording(nn.Module):
    """A planner that remembers which sentences it has read, and how often each context."""

    def __init__(self, planner: Planner) -> None:
        super().__init__()
        self.planner, self.read, self.contexts = planner, set(), 0

    def forward(self, embeddings: Tensor) -> Tensor:
        self.contexts += len(embeddings)
        self.read |= {row.tobytes() for row in embeddings.flatten(0, 1).numpy() if row.any()}
        return self.planner(embeddings)


def sentences_of(corpus: Corpus, documents: np.ndarray) -> set[bytes]:
    """The embeddings of some documents' sentences, as a planner is given them."""
    return {row.tobytes() for row in corpus.embeddings[corpus.sentences(documents)]}


@pytest.fixture
def make_documents() -> Callable[[list[list[int]]], Corpus]:
    """A corpus of training documents with given tokens, as far as dealing them needs it."""

    def make(documents: list[list[int]]) -> Corpus:
        nothing = np.zeros(0)
        return Corpus(
            folder=Path("nowhere"),
            tokens=np.concatenate([np.array(tokens, dtype=np.uint16) for tokens in documents]),
            document_tokens=np.cumsum([0, *map(len, documents)]),
            split=np.zeros(len(documents), dtype=np.uint8),
            group=np.arange(len(documents)),
            **dict.fromkeys(["document_sentences", "first_token", "spans", "embeddings", "actions"], nothing),
            codebook=Codebook(nothing),
            facts={"bos": "document", "chats": 0},
        )

    return make


def test_training_documents_are_dealt_evenly_and_others_not_at_all(tiny_run: Run):
    corpus = tiny_run.corpus
    fold = fold_of_documents(corpus, FOLDS, seed=0)
    train = corpus.documents("train")
    counts = np.bincount(fold[train], minlength=FOLDS)
    assert len(counts) == FOLDS
    assert counts.max() - counts.min() <= 1
    assert (fold == -1).sum() == len(fold) - len(train)
    assert np.array_equal(fold, fold_of_documents(corpus, FOLDS, seed=0))
    assert not np.array_equal(fold, fold_of_documents(corpus, FOLDS, seed=1))


def test_the_same_text_is_in_one_fold(make_documents: Callable[[list[list[int]]], Corpus]):
    texts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 1], [2, 2]]
    fold = fold_of_documents(make_documents(texts * 4), FOLDS, seed=0)
    assert sorted(np.bincount(fold) // 4) == [1, 2, 2]
    assert all(len(set(fold[i::5])) == 1 for i in range(5))


def test_a_group_is_in_one_fold(make_documents: Callable[[list[list[int]]], Corpus]):
    """Other documents are dealt as they are without groups."""
    texts = [[n, n + 1] for n in range(12)]
    alone = fold_of_documents(make_documents(texts), FOLDS, seed=0)
    corpus = make_documents([*texts, *([50 + n] for n in range(12))])
    group = np.tile(np.arange(12), 2)
    fold = fold_of_documents(replace(corpus, group=group), FOLDS, seed=0)
    assert all(len(set(fold[group == number])) == 1 for number in range(12))
    assert np.bincount(fold).tolist() == [8, 8, 8]
    same = fold_of_documents(replace(make_documents(texts * 2), group=group), FOLDS, seed=0)
    np.testing.assert_array_equal(same, np.tile(alone, 2))
    with pytest.raises(ProbekitError, match="there are 1 distinct training documents"):
        fold_of_documents(replace(corpus, group=np.zeros(24, np.int64)), 2, seed=0)


def test_more_folds_than_texts_are_refused(make_documents: Callable[[list[list[int]]], Corpus]):
    corpus = make_documents([[1, 2], [1, 2], [3]])
    with pytest.raises(ProbekitError, match=r"training.planner.folds is 3, but there are 2 distinct"):
        fold_of_documents(corpus, 3, seed=0)
    assert set(fold_of_documents(corpus, 2, seed=0)) == {0, 1}


def test_a_folds_planner_is_trained_outside_it_and_selected_on_validation(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
):
    corpus, given = tiny_run.corpus, set()
    batch = planner_stage.document_batch

    def recording(corpus: Corpus, documents: np.ndarray) -> tuple[Tensor, Tensor]:
        given.update(documents.tolist())
        return batch(corpus, documents)

    monkeypatch.setattr(planner_stage, "document_batch", recording)
    fold = fold_of_documents(corpus, FOLDS, tiny_run.config.seed)
    for number in range(FOLDS):
        given.clear()
        stage, rows = trainer(tiny_run, training__planner__folds=FOLDS, training__planner__epochs=1)
        train_planner(stage, number)
        outside = {d for d in corpus.documents("train") if fold[d] != number}
        assert given == outside | set(corpus.documents("validation"))
        assert {row["stage"] for row in rows} == {f"planner/fold{number}"}


def test_every_document_is_scored_by_its_folds_planner_alone(tiny_run: Run):
    corpus, fold = tiny_run.corpus, fold_of_documents(tiny_run.corpus, FOLDS, 0)
    centroids = torch.from_numpy(corpus.codebook.centroids)
    planners = [Planner(tiny_run.config.planner, centroids, seed).eval() for seed in range(FOLDS)]
    recording = [Recording(planner) for planner in planners]
    windows = cut_windows(corpus, corpus.documents("train"), 11, 11)[::7][:40]
    batch = collate(corpus, windows)
    found = OutOfFold(recording, corpus, 0).scores(batch)
    assert sum(one.contexts for one in recording) == len(batch.documents) == len(set(windows.document))
    place = np.stack(np.divmod(batch.touched.numpy(), batch.context.shape[1]), axis=1)
    for scores, (row, sentence) in zip(found, place, strict=True):
        document = batch.documents[row]
        first = corpus.document_sentences[document]
        read = torch.from_numpy(np.array(corpus.embeddings[first : first + sentence + 1]))
        with torch.no_grad():
            alone = planners[fold[document]](read[None])[0, -1]
        torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize("variant", ["predicted", "mixed", "soft"])
def test_training_reads_no_planner_that_has_seen_the_document(tiny_run: Run, variant: str):
    corpus = tiny_run.corpus
    fold = fold_of_documents(corpus, FOLDS, tiny_run.config.seed)
    planners = [Recording(tiny_run.planner()) for _ in range(FOLDS)]
    whole = Recording(tiny_run.planner())
    stage, _ = trainer(tiny_run)
    AdapterTraining(stage, variant, base_lm(tiny_run), whole, fold_planners=planners).run()
    train = corpus.documents("train")
    for number, planner in enumerate(planners):
        assert planner.read
        assert planner.read <= sentences_of(corpus, train[fold[train] == number])
    assert whole.read
    assert whole.read <= sentences_of(corpus, corpus.documents("validation"))


@pytest.mark.parametrize(("variant", "changes"), [("soft", True), ("joint", False), ("fixed", False)])
def test_variants_whose_planner_is_trained_or_not_read_have_no_folds(
    tiny_run: Run, variant: str, changes: bool
):
    centroids = torch.from_numpy(tiny_run.corpus.codebook.centroids)
    others = [Planner(tiny_run.config.planner, centroids, seed).eval() for seed in range(FOLDS)]
    trained = []
    for planners in ([], others):
        stage, _ = trainer(tiny_run)
        model = AdapterTraining(
            stage, variant, base_lm(tiny_run), tiny_run.planner(), fold_planners=planners
        ).run()
        trained.append(flat(model.adapter))
    assert torch.equal(*trained) != changes


def test_fold_planners_are_stages_that_a_run_keeps(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config.override({"training.planner.folds": 2, "mixing.variants": ["soft", "joint"]})
    log, stopped = Run.log, {"stage": "planner/fold1", "step": 2}

    def interrupted(self: Run, row: dict) -> None:
        if stopped.items() <= row.items():
            raise KeyboardInterrupt
        log(self, row)

    monkeypatch.setattr(Run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", quiet=True)
    monkeypatch.undo()
    first = tmp_path / "run" / "planner" / "fold0.safetensors"
    before = first.stat().st_mtime_ns
    run = train(config, tmp_path / "run", existing="resume", quiet=True)
    assert first.stat().st_mtime_ns == before
    stages = ["corpus", "lm", "planner", "planner/fold0", "planner/fold1", "adapter/soft", "adapter/joint"]
    assert list(read_json(run.folder / "run.json")["stages"]) == stages
    weights = {path.stem: read_tensors(path)["start"] for path in (run.folder / "planner").iterdir()}
    assert weights.keys() == {"model", "fold0", "fold1"}
    assert not torch.equal(weights["fold0"], weights["fold1"])
    # Evaluation has the planner of all training documents.
    assert torch.equal(run.model("soft").planner.start, weights["model"])
    assert torch.equal(run.fold_planner(1).start, weights["fold1"])
