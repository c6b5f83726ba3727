"""Options of joint training: the planner frozen at first, a temperature and an encoder that are learned."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_trainings import base_lm, first_loss, flat, one_step, trainer
from torch.nn.functional import cross_entropy

from probekit.config import Config
from probekit.data.windows import IGNORE, document_batch
from probekit.evaluation.baselines import planner_log_probabilities, planners
from probekit.evaluation.evaluate import evaluate
from probekit.models.mixing import VARIANTS
from probekit.models.planned_lm import PlannedLM
from probekit.models.planner import TrainableEncoder
from probekit.run.run import Run
from probekit.training.adapter import AdapterTraining, _encoder
from probekit.training.train import train

JOINT = [name for name, variant in VARIANTS.items() if variant.joint]
TRAINED = {"training__joint__encoder_learning_rate": 1e-2}


def trained(run: Run, variant: str = "joint", **settings: Any) -> tuple[PlannedLM, list[dict[str, Any]]]:
    stage, rows = trainer(run, **settings)
    return AdapterTraining(stage, variant, base_lm(run), run.planner()).run(), rows


# The planner frozen at first


@pytest.mark.parametrize("variant", ["joint", "gumbel"])
def test_until_then_training_is_that_with_a_frozen_planner(tiny_run: Run, variant: str):
    """Losses are those of a planner that is never trained, own loss left out, up to the first step after."""
    begun = flat(tiny_run.planner())
    never, frozen_rows = trained(tiny_run, variant, training__joint__planner_frozen=1)
    assert torch.equal(flat(never.planner), begun)
    late, rows = trained(tiny_run, variant, training__joint__planner_frozen=3)
    losses, frozen_losses = ([row["loss"] for row in each if "loss" in row] for each in (rows, frozen_rows))
    assert losses[:3] == frozen_losses[:3]
    assert losses[3] > frozen_losses[3] + 0.5  # its own loss counts from now on
    assert not torch.equal(flat(late.planner), begun)


def test_a_joint_variant_that_stays_frozen_is_soft_mixing(tiny_run: Run):
    never, _ = trained(tiny_run, "joint", training__joint__planner_frozen=1)
    soft, _ = trained(tiny_run, "soft")
    assert torch.equal(flat(never.adapter), flat(soft.adapter))


def test_a_planner_that_is_frozen_to_a_step_takes_the_whole_schedule_after_it(tiny_run: Run):
    # A rate that fell along with the adapter's would hardly move it in the last step.
    steps = {"training__adapter__epochs": 1}
    begun = flat(tiny_run.planner())
    late, rows = trained(tiny_run, training__joint__planner_frozen=6, **steps)
    assert max(row["step"] for row in rows) == 7
    moved = (flat(late.planner) - begun).abs().max().item()
    assert moved == pytest.approx(tiny_run.config.training.joint.planner_learning_rate, rel=0.01)


# Not end to end


@pytest.mark.parametrize("variant", ["joint", "gumbel"])
def test_without_end_to_end_the_planner_has_the_gradient_of_its_own_loss_alone(tiny_run: Run, variant: str):
    corpus, gradients = tiny_run.corpus, {}
    for end_to_end in (True, False):
        stage, _ = trainer(tiny_run, training__joint__end_to_end=end_to_end)
        planner = tiny_run.planner().requires_grad_(True)
        training = AdapterTraining(stage, variant, base_lm(tiny_run), planner)
        with torch.no_grad():
            training.model.adapter.projections *= 100
        every = np.arange(len(stage.windows("train")))
        training.loss(every, every).backward()
        assert training.model.adapter.projections.grad.abs().sum() > 0
        gradients[end_to_end] = torch.cat([p.grad.flatten() for p in planner.parameters()])
    mine = tiny_run.planner().requires_grad_(True)
    embeddings, actions = document_batch(corpus, corpus.documents("train"))
    cross_entropy(mine(embeddings).flatten(0, 1), actions.flatten(), ignore_index=IGNORE).backward()
    own = torch.cat([p.grad.flatten() for p in mine.parameters()])
    torch.testing.assert_close(gradients[False], own, rtol=1e-3, atol=1e-5)
    assert (gradients[True] - own).norm() > 0.01 * own.norm()


# The temperature


@pytest.mark.parametrize("variant", ["soft", "gumbel"])
def test_the_loss_reaches_the_temperature(tiny_run: Run, variant: str):
    model, _ = trained(tiny_run, variant, mixing__learn_temperature=True, mixing__temperature=0.7)
    assert model.temperature.item() != pytest.approx(0.7, abs=1e-4)
    assert model.temperature.item() > 0


@pytest.mark.parametrize("variant", ["predicted", "mixed"])
def test_variants_without_a_softmax_have_none_to_learn(tiny_run: Run, variant: str):
    model, _ = trained(tiny_run, variant, mixing__learn_temperature=True, mixing__temperature=0.7)
    assert model.temperature == 0.7
    assert model.log_temperature is None


def test_its_gradient_is_that_of_differences(tiny_run: Run):
    stage, _ = trainer(tiny_run, mixing__learn_temperature=True, mixing__temperature=0.5)
    training = AdapterTraining(stage, "soft", base_lm(tiny_run), tiny_run.planner())
    model, rows = training.model.double(), np.arange(4)
    with torch.no_grad():
        model.adapter.projections *= 100
    log_temperature = model.log_temperature
    training.loss(rows, rows).backward()
    losses = []
    for step in (-0.05, 0.05):  # far apart, as losses are float32
        with torch.no_grad():
            log_temperature += step
            losses.append(training.loss(rows, rows).item())
            log_temperature -= step
    assert log_temperature.grad.item() == pytest.approx((losses[1] - losses[0]) / 0.1, rel=1e-2)
    assert abs(log_temperature.grad.item()) > 1e-6


# The encoder


def test_the_encoder_that_is_trained_is_where_all_else_is(tiny_run: Run):
    stage, _ = trainer(tiny_run)
    encoder = _encoder(replace(stage, device=torch.device("meta")))
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}


def test_the_loss_reaches_the_encoder_and_no_frozen_one(tiny_run: Run):
    weights = {}
    for name, settings in {
        "lm": {"training__joint__planner_loss_weight": 0},  # through the mixing alone
        "both": {},
        "late": {"training__joint__planner_frozen": 6},
    }.items():
        model, _ = trained(tiny_run, **TRAINED, **settings)
        weights[name] = flat(model.encoder)
        assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    begun = flat(TrainableEncoder(tiny_run.encoder()))
    moved = {name: (value - begun).abs().max().item() for name, value in weights.items()}
    assert min(moved.values()) > 1e-4
    assert moved["late"] < moved["both"]
    assert not torch.equal(weights["lm"], weights["both"])
    assert trained(tiny_run)[0].encoder is None
    assert trained(tiny_run, "soft", **TRAINED)[0].encoder is None


def test_before_its_first_step_the_loss_is_that_of_the_stored_embeddings(tiny_run: Run):
    losses = [
        first_loss(trained(tiny_run, **one_step("adapter"), **settings)[1]) for settings in ({}, TRAINED)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_each_sentence_is_embedded_once_a_step_and_only_what_is_read(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
):
    corpus, given = tiny_run.corpus, []
    forward = TrainableEncoder.forward

    def recording(self: TrainableEncoder, sentences: list[str]) -> torch.Tensor:
        given.append(list(sentences))
        return forward(self, sentences)

    monkeypatch.setattr(TrainableEncoder, "forward", recording)
    trained(tiny_run, **(TRAINED | one_step("adapter")))
    # One step over all windows of the training documents, then one pass over those of validation.
    expected = []
    for split in ("train", "validation"):
        documents = corpus.documents(split)
        last = corpus.document_sentences[documents + 1] - 1
        expected += corpus.sentence_texts(np.setdiff1d(corpus.sentences(documents), last))
    assert [text for sentences in given for text in sentences] == expected


@pytest.fixture(scope="module")
def everything(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with all options of joint training at once."""
    settings = {
        "mixing.variants": ["soft", *JOINT],
        "mixing.learn_temperature": True,
        "mixing.temperature": 0.8,
        "training.planner.target_temperature": 0.1,
        "training.planner.folds": 2,
        "training.joint.planner_frozen": 0.25,
        "training.joint.encoder_learning_rate": 1e-2,
        "training.joint.planner_learning_rate": 1e-2,
        "training.adapter.epochs": 2,
    }
    return train(tiny_config.override(settings), tmp_path_factory.mktemp("joint") / "run", quiet=True)


@pytest.mark.parametrize("variant", ["soft", *JOINT])
def test_a_variant_comes_back_as_it_was_trained(everything: Run, variant: str):
    """Its validation loss, from the files alone, is the one that training saw last."""
    corpus = everything.corpus_of(variant)
    stage, _ = trainer(everything, corpus)
    training = AdapterTraining(stage, "soft", everything.frozen_lm(), everything.planner())
    training.model, training._variant = everything.model(variant), variant
    found = stage.mean_loss(stage.windows("validation"), 32, training.validation_losses)
    metrics = everything.metrics()
    logged = metrics[metrics.stage == f"adapter/{variant}"].validation_loss.min()
    assert found == pytest.approx(logged, rel=1e-5)
    assert everything.temperature(variant) == everything.model(variant).temperature
    assert everything.temperature(variant) != pytest.approx(0.8, abs=1e-4)


def test_each_joint_variant_has_embeddings_of_its_own(everything: Run):
    corpus, texts = everything.corpus, everything.corpus.sentence_texts(np.arange(300))
    assert everything.corpus_of("soft") is corpus
    np.testing.assert_array_equal(everything.encoder("soft").encode(texts), corpus.embeddings[:300])
    for variant in JOINT:
        own = everything.corpus_of(variant)
        assert own.embeddings.shape == corpus.embeddings.shape
        np.testing.assert_allclose(everything.encoder(variant).encode(texts), own.embeddings[:300], atol=1e-6)
        assert np.abs(own.embeddings - corpus.embeddings).max() > 0.01
        assert own.actions is corpus.actions


def test_evaluation_reads_the_embeddings_of_each_variant(everything: Run):
    found = planners(everything)
    documents = everything.corpus.documents("test")
    planner, corpus = found["planner after joint"]
    right = planner_log_probabilities(planner, corpus, documents)
    assert not np.allclose(right, planner_log_probabilities(planner, everything.corpus, documents))
    table = evaluate(everything, quiet=True).planner.set_index(["reader", "metric"]).value
    value = table["planner after joint", "cross_entropy"]
    sentences = everything.corpus.sentences(documents)
    later = ~np.isin(sentences, everything.corpus.document_sentences[documents])
    assert (~later).sum() == len(documents)
    losses = -right[np.arange(len(right)), everything.corpus.actions[sentences]]
    assert value == pytest.approx(losses[later].mean(), rel=1e-6)
