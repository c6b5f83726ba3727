"""The table of what each stage uses: whole, and true of the bits that stages leave."""

from pathlib import Path

import pytest
import torch

from probekit.config import Config, setting_names
from probekit.models.mixing import VARIANTS
from probekit.run import Run
from probekit.stage_settings import JOINT, TEMPERED, USED_BY, stage_settings, stages_of, stages_that_use
from probekit.training.train import train

NOT_TRAINED_WITH = ("device", "evaluation", "generation", "probe", "mixing.variants")


def changed(config: Config, stage: str, settings: dict[str, object]) -> bool:
    return stage_settings(config, stage) != stage_settings(config.override(settings), stage)


def test_every_setting_has_its_users_and_every_row_its_settings():
    stages = {"corpus", "lm", "planner", "planner/fold", *(f"adapter/{variant}" for variant in VARIANTS)}
    for name in setting_names():
        users = stages_that_use(name)
        assert {*users} <= stages
        assert bool(users) != name.startswith(NOT_TRAINED_WITH), name
    for section in USED_BY:
        assert any(f"{name}.".startswith(f"{section}.") for name in setting_names()), section


@pytest.mark.parametrize(
    ("settings", "users"),
    [
        ({"seed": 7}, {"lm", "planner", "adapter/fixed", "adapter/mixed", "adapter/soft", "adapter/joint"}),
        ({"corpus.planted.seed": 7}, {"corpus", "lm", "planner", "adapter/fixed", "adapter/mixed",
                                      "adapter/soft", "adapter/joint"}),
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


def test_a_pretrained_lm_depends_on_no_corpus():
    config = Config.from_preset("gpt2-wikipedia")
    assert not changed(config, "lm", {"corpus.seed": 7})
    assert changed(config, "planner", {"corpus.seed": 7})
    assert changed(config, "corpus", {"lm.name": "another"})


def test_variants_that_the_table_names_are_those_whose_mixing_it_is():
    scores, actions, codebook = torch.eye(4)[:3], torch.arange(3), torch.randn(4, 2)

    def mixed(variant: str, temperature: float) -> torch.Tensor:
        torch.manual_seed(0)
        chosen = VARIANTS[variant]
        trained = chosen.training(scores.requires_grad_(), actions, codebook.requires_grad_(), temperature)
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
            "evaluation.stride": 7,
            "generation.prompts": 7,
            "probe.distances": [3],
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
