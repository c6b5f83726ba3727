"""The depth ensemble's stage: its loss against one written out, what it trains, on every kind of LM."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_trainings import QUIET, run_maker
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from probekit.config import Config
from probekit.data.windows import IGNORE, Batch, collate, cut_windows
from probekit.errors import ProbekitError
from probekit.generation.generate import generate
from probekit.io import read_json
from probekit.models.depth_ensemble import MEMBERS, final_norm
from probekit.models.mixing import VARIANTS, Fixed
from probekit.models.tuning import TUNINGS
from probekit.run.run import Run
from probekit.training import train as stages
from probekit.training.depth_ensemble import DepthTraining
from probekit.training.train import train
from probekit.training.trainer import Trainer

MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def make_run(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Trains the ensembles of a run that has all else from the tiny one."""
    fixed = {
        "method": "depth-ensemble",
        "training.depth.batch_size": 8,
        "training.depth.learning_rate": 1e-2,
        "training.base.learning_rate": 3e-3,
        "training.base.rank": 2,
        "evaluation.questions": 20,
    }
    return run_maker(tiny_run, tmp_path_factory.mktemp("depth"), fixed)


def training(run: Run, member: str, **settings: Any) -> tuple[DepthTraining, list[dict[str, Any]]]:
    """The training of a member on the run's LM, and the rows that it will log."""
    rows: list[dict[str, Any]] = []
    config = run.config.override({name.replace("__", "."): value for name, value in settings.items()})
    trainer = Trainer(config, run.corpus, run.device, rows.append, QUIET)
    chosen = config.training.base
    tuned = chosen.tuning != "frozen"
    base = TUNINGS[chosen.tuning](run.plain_model(), chosen, config.seed) if tuned else None
    return DepthTraining(trainer, member, run.frozen_lm(), run.model("none"), base), rows  # type: ignore[arg-type]


def validation_loss(run: Run, name: str) -> float:
    """Mean loss of validation tokens of a model as it is found again, its logits made at once."""
    corpus, window = run.corpus, run.config.training.window
    windows = cut_windows(corpus, corpus.documents("validation"), window, window)
    batch: Batch = collate(corpus, windows)
    variant = run.variant_of(name)  # type: ignore[arg-type]
    mixing = VARIANTS[variant].evaluation if variant in VARIANTS else Fixed()
    with torch.no_grad():
        logits = run.model(name)(batch, mixing)  # type: ignore[arg-type]
    return cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE).item()


def last_loss(run: Run, name: str) -> float:
    """The best validation loss that was logged."""
    rows = run.metrics()
    return rows[rows.stage == f"depth/{name}"].validation_loss.min()


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_loss_is_the_paper_s(weight: float, tiny_run: Run):
    """On all training windows at once: cross-entropy of the mixture, and of each layer, and divergences."""
    settings = {"depth__distillation__weight": weight, "depth__layer_loss": 0.3, "depth__last_weight": 0.4}
    trained, _ = training(tiny_run, "distilled", **settings)
    rows = np.arange(30)
    found = trained.loss(rows, rows).item()
    plain = tiny_run.plain_model().eval()
    norm, head = final_norm(tiny_run.frozen_lm(), plain), plain.lm_head
    corpus, window = tiny_run.corpus, tiny_run.config.training.window
    batch = collate(corpus, cut_windows(corpus, corpus.documents("train"), window, window)[rows])
    with torch.no_grad():
        hidden = plain(batch.tokens, output_hidden_states=True, use_cache=False).hidden_states
        # The last of them has gone through the final norm already.
        states = [norm(hidden[1]), norm(hidden[2]), hidden[3]]
        router = trained.ensemble.router
        weights = torch.softmax(states[-1] @ router.weight.T + router.bias, dim=-1)
        scored = batch.targets != IGNORE
        targets = batch.targets[scored]
        layers = [head(state)[scored] for state in states]
        mixture = sum(weights[scored][:, i : i + 1] * one for i, one in enumerate(layers))
        expected = cross_entropy(mixture, targets) + 0.3 * sum(cross_entropy(one, targets) for one in layers)
        teacher = log_softmax(layers[-1], -1)
        for one in layers[:-1]:
            divergence = kl_div(teacher, log_softmax(one, -1), log_target=True, reduction="batchmean")
            expected = expected + weight * divergence
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_observed_is_of_each_layer(tiny_run: Run):
    trained, _ = training(tiny_run, "ensemble")
    seen = trained.observed(np.arange(30))
    alone, _ = training(tiny_run, "plain")
    assert seen["layer_loss-1"] == pytest.approx(alone.observed(np.arange(30))["ensemble_loss"], rel=1e-5)
    assert seen["layer_loss-3"] > seen["layer_loss-1"]
    assert sum(seen[f"weight-{i}"] for i in (1, 2, 3)) == pytest.approx(1.0)
    uniform, _ = training(tiny_run, "ensemble", depth__last_weight=1 / 3)
    assert uniform.observed(np.arange(5))["sparsity"] == pytest.approx(0.0, abs=0.01)
    assert "sparsity" not in alone.observed(np.arange(5))


@pytest.mark.parametrize(
    ("member", "tuning"), [("ensemble", "frozen"), ("distilled", "lora"), ("distilled", "full")]
)
def test_a_step_moves_norms_router_and_what_is_tuned_and_nothing_else(
    member: str, tuning: str, tiny_run: Run
):
    settings = {"training__base__tuning": tuning, "training__base__rank": 2, "training__depth__epochs": 0.01}
    trained, _ = training(tiny_run, member, **settings)
    before = {name: value.clone() for name, value in trained.ensemble.state_dict().items()}
    tuned = [] if trained._tuning is None else trained._tuning.parameters
    base = [parameter.detach().clone() for parameter in tuned]
    trained.run()
    after = trained.ensemble.state_dict()
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert moved == {"scale", "shift", "router.weight", "router.bias"}
    changed = [not new.equal(old) for new, old in zip(tuned, base, strict=True)]
    # In one step only the second halves of updates move; of all weights, all but the LM's own final norm.
    assert sum(changed) == {"frozen": 0, "lora": len(base) / 2, "full": len(base) - 2}[tuning]


def test_updates_in_the_last_layers_alone(tiny_run: Run):
    from probekit.config import TuningSettings

    settings = TuningSettings(tuning="lora", rank=2, last_layers=1)
    model = tiny_run.plain_model()
    trained = TUNINGS["lora"](model, settings, 0).parameters
    names = [name for name, value in model.named_parameters() if any(value is one for one in trained)]
    assert names
    assert all(name.startswith("transformer.h.2.") for name in names)
    with pytest.raises(ProbekitError, match=r"training\.base\.last_layers is 7, but the LM has 3 layers"):
        TUNINGS["lora"](tiny_run.plain_model(), TuningSettings(tuning="lora", last_layers=7), 0)


@pytest.mark.parametrize(
    ("tuning", "members"), [("frozen", [*MEMBERS]), ("lora", ["distilled"]), ("full", ["distilled"])]
)
def test_every_member_is_found_again_as_it_was_validated(tuning: str, members: list[str], make_run: MakeRun):
    run = make_run(training__base__tuning=tuning, depth__members=members)
    assert run.members == members
    stages = read_json(run.folder / "run.json")["stages"]
    sizes = {"plain": 2 * 32} | dict.fromkeys(("repeated", "ensemble", "distilled"), 3 * 32 * 3 + 3)
    for member in members:
        assert validation_loss(run, member) == pytest.approx(last_loss(run, member), rel=1e-4)
        assert stages[f"depth/{member}"]["parameters"] == sizes[member]
        assert ("tuned_parameters" in stages[f"depth/{member}"]) == (tuning != "frozen")


@pytest.mark.parametrize(
    "settings",
    [
        {"conditioning__kind": "adapter", "training__base__tuning": "lora"},
        {"conditioning__kind": "token", "training__base__tuning": "frozen"},
        # Only TransformerLens has this location of a GPT-2.
        {"conditioning__location": "attn.hook_q", "training__base__tuning": "frozen"},
    ],
)
def test_on_a_planner_conditioned_lm(settings: dict[str, str], make_run: MakeRun):
    run = make_run(depth__variant="soft", depth__members=["ensemble"], **settings)
    assert validation_loss(run, "ensemble") == pytest.approx(last_loss(run, "ensemble"), rel=1e-4)
    assert validation_loss(run, "ensemble") < validation_loss(run, "soft") + 0.01
    (text,) = generate(run, [""], variant="ensemble", tokens=12)
    assert len(text.tokens) == 12
    assert len(text.plan) > 0


def test_the_same_seed_gives_the_same_bits(make_run: MakeRun, tiny_run: Run):
    run = make_run(training__base__tuning="lora", depth__members=["distilled"])
    again = [training(run, "distilled")[0].run().state_dict() for _ in range(2)]
    stored = run._ensemble("distilled").state_dict()
    for name, value in stored.items():
        assert again[0][name].equal(again[1][name])
        assert again[0][name].equal(value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"depth.layers": 4}, "depth.layers is 4, but lm.layers is 3"),
        ({"depth.layers": 2, "depth.top_k": 3}, "top_k 3 exceeds layers 2"),
        ({"depth.variant": "gumbel"}, "depth.variant is 'gumbel', which is not among mixing.variants"),
        ({"depth.last_weight": 1.0}, "depth.last_weight is 1.0"),
        ({"depth.members": []}, "depth.members"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    settings: dict[str, object], said: str, tiny_config: Config, tmp_path
):
    with pytest.raises(ProbekitError, match=said.replace("(", r"\(")):
        train(tiny_config.override({"method": "depth-ensemble"} | settings), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_planners_of_folds_score_training_documents(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch):
    run = make_run(depth__variant="soft", depth__members=["plain"], training__planner__folds=2)
    conditioned = run.model("soft")
    trainer = Trainer(run.config, run.corpus, run.device, lambda row: None, QUIET)
    folds = [run.fold_planner(fold) for fold in range(2)]
    trained = DepthTraining(trainer, "plain", run.frozen_lm("soft"), conditioned, None, folds)
    monkeypatch.setattr(
        conditioned.planner, "forward", lambda *_: pytest.fail("the planner of all documents")
    )
    rows = np.arange(8)
    trained.loss(rows, rows)


def test_an_ensemble_on_a_tuned_lm_holds_one_copy(
    make_run: MakeRun, copies: Callable[[], int], monkeypatch: pytest.MonkeyPatch
):
    """What conditions the LM runs the copy that is tuned."""
    run = make_run(depth__members=["plain"], training__base__tuning="lora")

    def begun(trainer: Any, member: str, lm: Any, conditioned: Any, tuning: Any, *_: Any) -> None:
        assert conditioned.backend.model is tuning.model
        assert copies() == 1
        raise ProbekitError("seen")

    monkeypatch.setattr(stages, "DepthTraining", begun)
    with pytest.raises(ProbekitError, match="seen"):
        stages._ensemble(run, QUIET, "plain")
