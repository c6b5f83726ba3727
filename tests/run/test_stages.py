"""The table of what each stage uses: whole, and true of the bits that stages leave."""

from pathlib import Path

import pytest
import torch

from probekit.config import Config, MixingSettings, setting_names
from probekit.models.mixing import VARIANTS, training_mixing
from probekit.run.run import Run
from probekit.run.stages import (
    CHOOSE_STAGES,
    DEPTH,
    EXECUTION_ONLY,
    JOINT,
    ONLY_WITH,
    TEMPERED,
    USED_BY,
    stage_settings,
    stages_of,
    stages_that_use,
    why_idle,
)
from probekit.training.train import train

NOT_TRAINED_WITH = (
    "device", "evaluation", "generation", "probe", "intervene", "continuation", "subnetwork",
    *EXECUTION_ONLY, *CHOOSE_STAGES,
)  # fmt: skip


def changed(config: Config, stage: str, settings: dict[str, object]) -> bool:
    return stage_settings(config, stage) != stage_settings(config.override(settings), stage)


def test_every_setting_has_its_users_and_every_row_its_settings():
    stages = {"corpus", "lm", "lm/new", "planner", "planner/fold", *DEPTH}
    stages |= {f"adapter/{name}" for name in VARIANTS}
    for name in setting_names():
        users = stages_that_use(name)
        assert {*users} <= stages
        assert bool(users) != name.startswith(NOT_TRAINED_WITH), name
    for section in USED_BY:
        assert any(f"{name}.".startswith(f"{section}.") for name in setting_names()), section
    for name, (switch, _) in ONLY_WITH.items():
        users = {user.removesuffix("/new") for user in stages_that_use(name)}
        assert users <= {*stages_that_use(switch)}, "where names differ, a value that both have differs too"


@pytest.mark.parametrize(
    ("settings", "users"),
    [
        ({"seed": 7}, {"lm", "planner", "adapter/fixed", "adapter/mixed", "adapter/soft", "adapter/joint"}),
        ({"corpus.planted.seed": 7}, {"corpus", "lm", "planner", "adapter/fixed", "adapter/mixed",
                                      "adapter/soft", "adapter/joint"}),
        ({"lm.bos": "none"}, {"corpus", "lm", "planner", "adapter/fixed", "adapter/mixed", "adapter/soft",
                              "adapter/joint"}),
        ({"lm.layers": 7}, {"lm", "adapter/fixed", "adapter/mixed", "adapter/soft", "adapter/joint"}),
        ({"planner.layers": 7}, {"planner", "adapter/mixed", "adapter/soft", "adapter/joint"}),
        ({"training.planner.folds": 7}, {"adapter/mixed", "adapter/soft"}),
        ({"mixing.fraction": 0.7}, {"adapter/mixed"}),
        ({"mixing.temperature": 0.7}, {"adapter/soft", "adapter/joint"}),
        ({"training.joint.planner_loss_weight": 0.7}, {"adapter/joint"}),
        ({"probe.l2": [0.7], "evaluation.stride": 7, "device": "cpu", "mixing.variants": ["soft"]}, set()),
    ],
)  # fmt: skip
def test_a_stage_depends_on_its_settings_and_on_those_of_what_it_builds_on(
    settings: dict[str, object], users: set[str]
):
    config = Config.from_preset("demo").override({"mixing.variants": ["fixed", "mixed", "soft", "joint"]})
    assert {stage for stage in stages_of(config) if changed(config, stage, settings)} == users


@pytest.mark.parametrize(
    ("settings", "users"),
    [
        ({"seed": 7}, {"lm", "planner", "adapter/soft", "depth/plain", "depth/repeated", "depth/distilled"}),
        ({"planner.layers": 7}, {"planner", "adapter/soft", "depth/plain", "depth/repeated",
                                 "depth/distilled"}),
        ({"depth.layers": 2}, {"depth/repeated", "depth/distilled"}),
        ({"depth.top_k": 2}, {"depth/repeated", "depth/distilled"}),
        ({"depth.distillation.weight": 7}, {"depth/distilled"}),
        ({"depth.layer_loss": 7}, {"depth/plain", "depth/repeated", "depth/distilled"}),
        ({"training.depth.epochs": 7}, {"depth/plain", "depth/repeated", "depth/distilled"}),
        ({"training.base.tuning": "lora"}, {"adapter/soft", "depth/plain", "depth/repeated",
                                            "depth/distilled"}),
        ({"training.base.last_layers": 1, "mixing.fraction": 0.1, "depth.members": ["plain"],
          "evaluation.questions": 7}, set()),
    ],
)  # fmt: skip
def test_stages_of_a_depth_ensemble(settings: dict[str, object], users: set[str]):
    config = Config.from_preset("demo").override(
        {
            "method": "depth-ensemble",
            "depth.members": ["plain", "repeated", "distilled"],
            "depth.variant": "soft",
        }
    )
    stages = stages_of(config)
    assert stages[:4] == ["corpus", "lm", "planner", "adapter/soft"]
    assert {stage for stage in stages if changed(config, stage, settings)} == users
    alone = stages_of(config.override({"depth.variant": "none"}))
    assert alone == ["corpus", "lm", *stages[4:]], "the base LM needs no planner"


@pytest.mark.parametrize(
    ("switch", "settings"),
    [
        ({"training.base.tuning": "lora"}, {"training.base.rank": 4}),
        ({"training.base.tuning": "full"}, {"training.base.learning_rate": 4}),
        ({}, {"conditioning.location": "hook_mlp_out"}),
        ({}, {"conditioning.skip_layers": 0}),
        ({}, {"lm.layers": 6}),
        ({}, {"lm.vocabulary": 600}),
        ({}, {"training.lm.epochs": 7}),
    ],
)
def test_what_is_switched_off_decides_nothing(switch: dict[str, object], settings: dict[str, object]):
    config = Config.from_preset("demo").override({"mixing.variants": ["fixed", "soft", "joint"]})
    on = config.override(switch)
    off = config if switch else config.override({"lm.name": "gpt2", "conditioning.kind": "token"})
    (name,) = settings
    assert any(changed(on, stage, settings) for stage in stages_of(on))
    assert not any(changed(off, stage, settings) for stage in stages_of(off))
    assert why_idle(on, name) is None
    assert why_idle(off, name)


def test_a_pretrained_lm_is_not_trained_and_depends_on_no_corpus():
    config = Config.from_preset("gpt2-wikipedia")
    for name, value in (
        ("seed", 7), ("training.window", 7), ("training.precision", "bfloat16"), ("corpus.seed", 7)
    ):  # fmt: skip
        assert not changed(config, "lm", {name: value})
    assert not any(changed(config, stage, {"training.lm.epochs": 7}) for stage in stages_of(config))
    assert changed(config, "planner", {"corpus.seed": 7})
    assert changed(config, "corpus", {"lm.name": "another"})


def test_variants_that_the_table_names_are_those_whose_mixing_it_is():
    scores, actions, codebook = torch.eye(4)[:3], torch.arange(3), torch.randn(4, 2)

    def mixed(variant: str, temperature: float) -> torch.Tensor:
        torch.manual_seed(0)
        chosen = training_mixing(variant, MixingSettings(), seed=0)
        trained = chosen(scores.requires_grad_(), actions, codebook.requires_grad_(), temperature)
        (gradient,) = torch.autograd.grad(trained.square().sum(), scores, allow_unused=True)
        return torch.zeros(3, 4) if gradient is None else gradient

    tempered = {v for v in VARIANTS if not torch.equal(mixed(v, 0.5), mixed(v, 2.0))}
    assert {f"adapter/{variant}" for variant in tempered} == {*TEMPERED}
    assert {f"adapter/{name}" for name, variant in VARIANTS.items() if variant.joint} == {*JOINT}


def test_what_a_stage_does_not_use_leaves_its_bits(tiny_config: Config, tiny_run: Run, tmp_path: Path):
    """Everything that corpus, LM and the fixed adapter do not use is changed; they stay what they are."""
    config = tiny_config.override(
        {
            "mixing.variants": ["fixed", "mixed"],
            "mixing.fraction": 0.3,
            "mixing.temperature": 0.3,
            "mixing.learn_temperature": True,
            "planner.width": 16,
            "training.planner.learning_rate": 1e-4,
            "training.planner.folds": 2,
            "training.joint.planner_loss_weight": 0.3,
            "training.base.learning_rate": 0.3,
            "training.base.rank": 3,
            "evaluation.stride": 7,
            "generation.prompts": 7,
            "probe.positions": [3],
        }
    )
    same = {"corpus", "lm", "adapter/fixed"}
    assert same == {
        s for s in stages_of(config) if stage_settings(config, s) == stage_settings(tiny_config, s)
    }
    run = train(config, tmp_path / "run", quiet=True)
    for name in ("corpus", "lm", "adapters/fixed.safetensors"):
        for path in [tiny_run.folder / name, *(tiny_run.folder / name).rglob("*")]:
            if path.is_file():
                assert (run.folder / path.relative_to(tiny_run.folder)).read_bytes() == path.read_bytes(), (
                    path
                )
    planner = "planner/model.safetensors"
    assert (run.folder / planner).read_bytes() != (tiny_run.folder / planner).read_bytes()
