"""The stages: what each one's loss is, what it trains, and what it leaves as it was."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from probekit.config import Config
from probekit.corpus.build import write_corpus
from probekit.corpus.examples import IGNORE, begun_sentences, collate, cut_windows
from probekit.corpus.store import Corpus
from probekit.errors import ProbekitError
from probekit.models.language_model import bridge, new_model
from probekit.models.mixing import VARIANTS, Oracle, Predicted
from probekit.models.planner import Planner
from probekit.progress import Progress
from probekit.run import Run
from probekit.training.stages import Trainer

QUIET = Progress(quiet=True)
WORDS = [
    "red", "blue", "old", "new", "king", "ship", "town", "river", "grew",
    "fell", "stood", "near", "by", "great", "small", "long", "wide", "green",
]  # fmt: skip
ALL = 10_000
"""A batch size that holds every example: one step an epoch, whose loss is that of all training data."""


def trainer(run: Run, corpus: Corpus | None = None, **settings: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    """A trainer on the tiny run's corpus (or another) and the rows that it will log."""
    rows: list[dict[str, Any]] = []
    config = run.config.override({name.replace("__", "."): value for name, value in settings.items()})
    return Trainer(config, corpus or run.corpus, torch.device("cpu"), rows.append, QUIET), rows


def one_step(stage: str, **settings: Any) -> dict[str, Any]:
    """Settings for one step over all training data."""
    fixed = {"epochs": 1, "batch_size": ALL, "learning_rate": 1e-6}
    return {f"training__{stage}__{name}": value for name, value in fixed.items()} | settings


def first_loss(rows: list[dict[str, Any]]) -> float:
    return next(row["loss"] for row in rows if "loss" in row)


def base_lm(run: Run) -> Any:
    """A bridge of the run's LM that a test has for itself."""
    return bridge(run.plain_model(), run.corpus.tokenizer, "lm")


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def mean_token_loss(run: Run, model: torch.nn.Module, split: str) -> float:
    """Mean loss of a split's tokens, window by window; a document's last one reaches back to be as long."""
    corpus, window = run.corpus, run.config.training.window
    total, count = 0.0, 0
    for document in corpus.documents(split):
        start, stop = corpus.document_tokens[document], corpus.document_tokens[document + 1]
        for first in range(start, stop - 1, window):
            last = min(first + window, stop - 1)
            read = torch.from_numpy(corpus.tokens[max(start, last - window) : last + 1].astype(np.int64))
            with torch.no_grad():
                logits = model(read[None, :-1]).logits[0]
            total += cross_entropy(logits[first - last :], read[first - last :], reduction="sum").item()
            count += last - first
    assert count == sum(np.diff(corpus.document_tokens)[corpus.documents(split)] - 1)
    return total / count


def mean_action_loss(corpus: Corpus, planner: Planner, documents: np.ndarray) -> float:
    """Mean loss of the documents' actions, document by document, first sentences too."""
    total, count = 0.0, 0
    for document in documents:
        rows = slice(corpus.document_sentences[document], corpus.document_sentences[document + 1])
        with torch.no_grad():
            scores = planner(torch.from_numpy(np.array(corpus.embeddings[rows]))[None])[0]
        actions = torch.from_numpy(corpus.actions[rows].astype(np.int64))
        total += cross_entropy(scores, actions, reduction="sum").item()
        count += len(actions)
    return total / count


# The LM


@pytest.mark.parametrize("accumulate", [1, 7])
def test_the_lms_loss_is_the_mean_over_all_tokens(tiny_run: Run, accumulate: int):
    stage, rows = trainer(tiny_run, **one_step("lm", training__lm__accumulate=accumulate))
    trained = stage.train_language_model()
    untrained = new_model(tiny_run.config.lm, tiny_run.corpus.tokenizer, tiny_run.config.seed)
    untrained.eval()
    assert first_loss(rows) == pytest.approx(mean_token_loss(tiny_run, untrained, "train"), rel=1e-5)
    assert rows[-1]["validation_loss"] == pytest.approx(
        mean_token_loss(tiny_run, trained, "validation"), rel=1e-5
    )
    assert not trained.training


def test_the_lm_learns(tiny_run: Run):
    stage, rows = trainer(tiny_run, training__lm__epochs=6, training__lm__learning_rate=1e-2)
    stage.train_language_model()
    unigram = np.bincount(tiny_run.corpus.tokens)
    frequencies = unigram[unigram > 0] / unigram.sum()
    assert rows[-1]["validation_loss"] < -(frequencies * np.log(frequencies)).sum()


# The planner


def test_the_planners_loss_is_the_mean_over_all_sentences(tiny_run: Run):
    stage, rows = trainer(tiny_run, **one_step("planner", planner__dropout=0.0))
    trained = stage.train_planner()
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
        stage.train_planner()
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
    stage.train_planner()
    assert modes == [True, False] * 3


@pytest.fixture(scope="module")
def short_documents(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus in which a third of the documents has one sentence."""
    return read_corpus(tiny_run.config, tmp_path_factory.mktemp("short"), [1, 3, 5] * 20)


def read_corpus(config: Config, folder: Path, lengths: list[int]) -> Corpus:
    """A corpus of documents with so many sentences each."""
    rng = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, 6)).capitalize() + " there."

    lines = [json.dumps({"text": " ".join(sentence() for _ in range(length))}) for length in lengths]
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
    trained = stage.train_planner()
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
        stage.train_planner()


# Adapters


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_is_left_as_it_was_to_the_bit(tiny_run: Run, variant: str):
    bridged, planner = base_lm(tiny_run), tiny_run.planner()
    before, planned = flat(bridged.original_model), flat(planner)
    stage, _ = trainer(tiny_run, training__adapter__epochs=0.3)
    model = stage.train_adapter(variant, bridged, planner)
    assert torch.equal(flat(bridged.original_model), before)
    assert all(parameter.grad is None for parameter in bridged.original_model.parameters())
    # Every variant moves its adapter, only joint ones the planner, and nothing is left in training.
    assert torch.equal(flat(planner), planned) != VARIANTS[variant].joint
    untouched = tiny_run.corpus.codebook.centroids
    assert not np.array_equal(model.adapter.codebook.detach().numpy(), untouched)
    assert not planner.training
    assert not any(p.requires_grad for p in planner.parameters())


def test_all_variants_begin_with_the_same_adapter(tiny_run: Run):
    first = []
    for variant in ("fixed", "oracle", "joint"):
        stage, _ = trainer(tiny_run, training__adapter__epochs=0.01, training__adapter__learning_rate=1e-12)
        model = stage.train_adapter(variant, base_lm(tiny_run), tiny_run.planner())
        first.append(flat(model.adapter))
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(first[0], first[2], rtol=0, atol=1e-9)


def test_adapters_are_selected_by_their_loss_as_it_is_evaluated(tiny_run: Run):
    # Oracle actions are there in training alone: selection must not see them.
    corpus, window = tiny_run.corpus, tiny_run.config.training.window
    settings = {"training__adapter__learning_rate": 0.1, "conditioning__skip_layers": 0}
    stage, rows = trainer(tiny_run, **settings)
    model = stage.train_adapter("oracle", base_lm(tiny_run), tiny_run.planner())
    windows = cut_windows(corpus, corpus.documents("validation"), window, window)
    losses = {}
    for name, mixing in (("predicted", Predicted()), ("true", Oracle())):
        batch = collate(corpus, windows)
        with torch.no_grad():
            logits = model(batch, mixing)
        losses[name] = cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE
        ).item()
    assert rows[-1]["validation_loss"] == pytest.approx(losses["predicted"], rel=1e-5)
    assert losses["predicted"] != pytest.approx(losses["true"], rel=1e-4)


def test_the_planner_drops_nothing_out_while_adapters_are_trained(tiny_run: Run):
    planner = tiny_run.planner().train()
    assert planner.encoder.layers[0].dropout.p > 0
    stage, rows = trainer(tiny_run)
    stage.train_adapter("joint", base_lm(tiny_run), planner)
    logged = [
        row for row in map(json.loads, (tiny_run.folder / "metrics.jsonl").open()) if "joint" in row["stage"]
    ]
    assert rows == logged


def joint_loss(run: Run, **settings: Any) -> float:
    """Loss of all training data at the first step of joint training."""
    stage, rows = trainer(run, **one_step("adapter", **settings))
    stage.train_adapter("joint", base_lm(run), run.planner())
    return first_loss(rows)


@pytest.mark.parametrize("window", [48, 11])
@pytest.mark.parametrize("accumulate", [1, 5])
def test_joint_training_adds_the_planners_own_loss_each_sentence_once(
    tiny_run: Run, window: int, accumulate: int
):
    settings = {"training__window": window, "training__adapter__accumulate": accumulate}
    without, single, double = (
        joint_loss(tiny_run, training__joint__planner_loss_weight=weight, **settings) for weight in (0, 1, 2)
    )
    corpus = tiny_run.corpus
    own = mean_action_loss(corpus, tiny_run.planner(), corpus.documents("train"))
    assert single - without == pytest.approx(own, rel=1e-5)
    assert double - without == pytest.approx(2 * own, rel=1e-5)


@pytest.mark.parametrize("window", [48, 11, 2])
def test_every_sentence_begins_in_exactly_one_window(tiny_run: Run, window: int):
    corpus = tiny_run.corpus
    documents = corpus.documents("train")
    windows = cut_windows(corpus, documents, window, window)
    begun = begun_sentences(corpus, windows)
    assert begun.sum() == len(corpus.sentences(documents))
    for start in range(0, len(windows), 50):
        rows = slice(start, start + 50)
        assert int(collate(corpus, windows[rows]).begun.sum()) == begun[rows].sum()


def joint_planner(run: Run, **settings: Any) -> Tensor:
    """The planner's weights after some joint training."""
    planner = run.planner()
    stage, _ = trainer(run, **settings)
    stage.train_adapter("joint", base_lm(run), planner)
    return flat(planner)


def test_the_planners_learning_rate_and_loss_weight_count(tiny_run: Run):
    before = flat(tiny_run.planner())
    still = joint_planner(tiny_run, training__joint__planner_learning_rate=0)
    alone, kept = (joint_planner(tiny_run, training__joint__planner_loss_weight=w) for w in (0, 1))
    assert torch.equal(still, before)
    assert not torch.equal(alone, before)
    assert not torch.equal(alone, kept)


def test_next_token_loss_alone_reaches_the_planner_through_soft_mixing(tiny_run: Run):
    # With its own loss dropped, what moves the planner can only be the LM's gradient through the mixing.
    moved = joint_planner(tiny_run, training__joint__planner_loss_weight=0)
    assert (moved - flat(tiny_run.planner())).abs().max() > 1e-5


def test_keeping_its_own_loss_keeps_the_planner_better(tiny_run: Run):
    corpus, losses = tiny_run.corpus, []
    for weight in (0, 1):
        planner = tiny_run.planner()
        stage, _ = trainer(
            tiny_run,
            training__joint__planner_loss_weight=weight,
            training__joint__planner_learning_rate=1e-2,
            training__adapter__epochs=3,
        )
        stage.train_adapter("joint", base_lm(tiny_run), planner)
        losses.append(mean_action_loss(corpus, planner, corpus.documents("validation")))
    assert losses[1] < losses[0]


def test_true_actions_help_where_a_constant_cannot(tiny_run: Run):
    # On planted text the true action says which words come.
    stage, _ = trainer(tiny_run, training__lm__epochs=5, training__lm__learning_rate=1e-2)
    lm = stage.train_language_model()
    losses = {}
    for variant in ("fixed", "oracle"):
        stage, rows = trainer(
            tiny_run,
            training__adapter__epochs=6,
            training__adapter__learning_rate=0.1,
            conditioning__skip_layers=0,
        )
        bridged = bridge(copy.deepcopy(lm), tiny_run.corpus.tokenizer, "lm")
        stage.train_adapter(variant, bridged, tiny_run.planner())
        losses[variant] = [row["loss"] for row in rows if "loss" in row][-1]
    assert losses["oracle"] < losses["fixed"] - 0.1


def test_a_loss_that_explodes_names_the_stage(tiny_run: Run):
    stage, _ = trainer(tiny_run, training__adapter__learning_rate=1e30, training__adapter__epochs=3)
    with pytest.raises(ProbekitError, match=r"training of adapter/soft: the (validation )?loss is"):
        stage.train_adapter("soft", base_lm(tiny_run), tiny_run.planner())


def test_bfloat16_trains_too_near_to_float32(tiny_run: Run):
    # Not every CPU is fast in it, but each can do it: the arithmetic of a GPU's default, with coarse numbers.
    losses = []
    for precision in ("float32", "bfloat16"):
        stage, rows = trainer(tiny_run, training__precision=precision, **one_step("adapter"))
        model = stage.train_adapter("joint", base_lm(tiny_run), tiny_run.planner())
        assert model.adapter.projections.dtype == torch.float32
        losses.append(first_loss(rows))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1] != losses[0]
