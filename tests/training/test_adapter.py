"""The adapter's stage: what each variant's loss is, what it trains, and what it leaves as it was."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from small_trainings import base_lm, first_loss, flat, mean_action_loss, one_step, trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from probekit.data.windows import IGNORE, beginnings, collate, cut_windows
from probekit.models.mixing import VARIANTS, Oracle, Predicted
from probekit.run.run import Run
from probekit.training.adapter import AdapterTraining


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_is_left_as_it_was_to_the_bit(tiny_run: Run, variant: str):
    lm, planner = base_lm(tiny_run), tiny_run.planner()
    before, planned = flat(lm.plain), flat(planner)
    stage, _ = trainer(tiny_run, training__adapter__epochs=0.3)
    model = AdapterTraining(stage, variant, lm, planner).run()
    assert torch.equal(flat(lm.plain), before)
    assert all(parameter.grad is None for parameter in lm.plain.parameters())
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
        model = AdapterTraining(stage, variant, base_lm(tiny_run), tiny_run.planner()).run()
        first.append(flat(model.adapter))
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(first[0], first[2], rtol=0, atol=1e-9)


def test_adapters_are_selected_by_their_loss_as_it_is_evaluated(tiny_run: Run):
    # Oracle actions are there in training alone: selection must not see them.
    corpus, window = tiny_run.corpus, tiny_run.config.training.window
    settings = {"training__adapter__learning_rate": 0.1, "conditioning__skip_layers": 0}
    stage, rows = trainer(tiny_run, **settings)
    model = AdapterTraining(stage, "oracle", base_lm(tiny_run), tiny_run.planner()).run()
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
    AdapterTraining(stage, "joint", base_lm(tiny_run), planner).run()
    logged = [
        row for row in map(json.loads, (tiny_run.folder / "metrics.jsonl").open()) if "joint" in row["stage"]
    ]
    losses, wanted = ([row["loss"] for row in each if "loss" in row] for each in (rows, logged))
    assert len(losses) > 3
    assert losses == pytest.approx(wanted, rel=1e-5)


def joint_loss(run: Run, **settings: Any) -> float:
    """Loss of all training data at the first step of joint training."""
    stage, rows = trainer(run, **one_step("adapter", **settings))
    AdapterTraining(stage, "joint", base_lm(run), run.planner()).run()
    return first_loss(rows)


@pytest.mark.parametrize(("window", "accumulate"), [(48, 1), (11, 5)])
def test_joint_training_adds_the_planners_own_loss_each_sentence_once(
    tiny_run: Run, window: int, accumulate: int
):
    settings = {"training__window": window, "training__accumulate": accumulate}
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
    begun = beginnings(corpus, windows)
    assert begun.sum() == len(corpus.sentences(documents))
    for start in range(0, len(windows), 50):
        rows = slice(start, start + 50)
        assert int(collate(corpus, windows[rows]).begins.sum()) == begun[rows].sum()


def joint_planner(run: Run, **settings: Any) -> Tensor:
    """The planner's weights after some joint training."""
    planner = run.planner()
    stage, _ = trainer(run, **settings)
    AdapterTraining(stage, "joint", base_lm(run), planner).run()
    return flat(planner)


def test_the_planners_learning_rate_and_loss_weight_count(tiny_run: Run):
    before = flat(tiny_run.planner())
    still = joint_planner(tiny_run, training__joint__planner_learning_rate=0)
    alone, kept = (joint_planner(tiny_run, training__joint__planner_loss_weight=w) for w in (0, 1))
    assert torch.equal(still, before)
    # With its own loss dropped, only the LM's gradient through the mixing can move it.
    assert (alone - before).abs().max() > 1e-5
    assert not torch.equal(alone, kept)


def test_bfloat16_trains_too_near_to_float32(tiny_run: Run):
    # Not every CPU is fast in it, but each can do it: the arithmetic of a GPU's default, with coarse numbers.
    losses = []
    for precision in ("float32", "bfloat16"):
        stage, rows = trainer(tiny_run, training__precision=precision, **one_step("adapter"))
        model = AdapterTraining(stage, "joint", base_lm(tiny_run), tiny_run.planner()).run()
        assert model.adapter.projections.dtype == torch.float32
        losses.append(first_loss(rows))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1] != losses[0]
