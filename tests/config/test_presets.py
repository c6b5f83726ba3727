"""The shipped presets: each loads, says what it is for, and is what the papers have where it says so."""

from importlib import resources

import pytest

from probekit.config import Config, preset_names
from probekit.models.mixing import VARIANTS

PAPER = ["gpt2-wikipedia", "olmo-1b-wikipedia"]


@pytest.mark.parametrize("name", preset_names())
def test_preset_loads_and_begins_with_what_it_is_for(name: str):
    assert isinstance(Config.from_preset(name), Config)
    text = (resources.files("probekit.config") / "presets" / f"{name}.yaml").read_text("utf-8")
    assert text.startswith("# ")


@pytest.mark.parametrize("name", preset_names())
def test_window_fits_a_new_lm_and_probed_variants_are_trained(name: str):
    config = Config.from_preset(name)
    if config.lm.name is None:
        assert config.training.window <= config.lm.positions
        assert config.conditioning.skip_layers < config.lm.layers
    assert set(config.probe.variants) <= {"none", "random", *config.mixing.variants}


def test_any_model_keeps_its_documents_for_probes():
    settings = Config.from_preset("any-model").corpus
    kept = settings.probe_fraction + settings.validation_fraction + settings.test_fraction
    assert kept == pytest.approx(0.8)
    assert settings.probe_fraction > settings.test_fraction
    assert set(Config.from_preset("any-model").probe.variants) == {"none", "random"}, "nothing is trained"


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_have_the_papers_settings(name: str):
    config = Config.from_preset(name)
    documents = config.corpus.max_documents
    assert documents is not None
    held_out = [
        round(share * documents)
        for share in (
            config.corpus.validation_fraction,
            config.corpus.test_fraction,
            config.corpus.probe_fraction,
        )
    ]
    assert held_out == [1000, 1000, 1000]
    assert documents - sum(held_out) == 285_310
    assert config.actions.k == 1024
    assert config.actions.encoder == "sentence-transformers/all-mpnet-base-v2"
    assert config.training.window == 128
    assert config.conditioning.location == "attn.hook_z"
    assert config.conditioning.skip_layers == 2
    planner = config.planner
    assert (planner.width, planner.layers, planner.heads, planner.pooling) == (768, 1, 2, "mean")
    for stage in (config.training.planner, config.training.adapter):
        assert (stage.learning_rate, stage.batch_size, stage.epochs) == (1e-4, 32, 1.0)
    assert config.training.planner.weight_decay == 1e-4
    assert set(config.mixing.variants) == set(VARIANTS) - {"mixed"}
    assert config.training.joint.planner_learning_rate < config.training.adapter.learning_rate
