"""The base LM's tuning: what it trains, that it is found again, and that the untuned one stays as it was."""

import copy
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from probekit.config import ConditioningSettings, TuningSettings
from probekit.data.corpus import Corpus
from probekit.data.windows import Batch, collate, cut_windows
from probekit.errors import ProbekitError
from probekit.io import read_tensors, write_tensors
from probekit.models.backends import BridgeBackend, HFBackend
from probekit.models.conditioning import new_adapter
from probekit.models.frozen_lm import FrozenLM
from probekit.models.language_model import load_model
from probekit.models.mixing import Oracle
from probekit.models.planned_lm import PlannedLM, token_losses
from probekit.models.pretrained import load_config
from probekit.models.tuning import LORA_WEIGHTS, TUNINGS, Tuning

FAMILIES = ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen2", "qwen3"]
DOCUMENTS = [[3, 2, 4], [1, 1, 5, 2]]  # tokens in each sentence


@pytest.fixture(scope="module")
def batch(make_corpus: Callable[..., Corpus]) -> Batch:
    corpus = make_corpus(DOCUMENTS)
    return collate(corpus, cut_windows(corpus, np.arange(2), 32, 32))


@pytest.fixture(scope="module")
def fresh(folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase) -> Callable[[str], FrozenLM]:
    """A family's LM, plain and bridged, of a test's own."""
    return lambda family: FrozenLM(
        lambda: load_model(str(folders[family])), load_config(str(folders[family])), tokenizer, family
    )


def settings(tuning: str, **more: float) -> TuningSettings:
    return TuningSettings(tuning=tuning, **{"rank": 2, **more})


def tuned(base: FrozenLM, batch: Batch, chosen: TuningSettings, steps: int = 4) -> tuple[PlannedLM, Tuning]:
    """A model whose adapter and LM were trained on a batch, and what became of the LM."""
    tuning = TUNINGS[chosen.tuning](load_model(base.plain.name_or_path), chosen, 0)
    codebook = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    adapter = new_adapter(ConditioningSettings(skip_layers=1), codebook, base, seed=0)
    backend = base.backend_for(adapter.names, tuning.model)
    assert isinstance(backend, HFBackend)
    model = PlannedLM(backend, None, adapter, 1.0)
    for parameter in tuning.parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW([*adapter.parameters(), *tuning.parameters], lr=0.02)
    losses = []
    for step in range(steps):
        loss = token_losses(model(batch, Oracle()), batch.targets).mean()
        losses.append(loss.item())
        loss.backward()
        if step == 1:  # at first, the updates' second halves are zero, and so are the first ones' gradients
            for parameter in tuning.parameters:
                assert parameter.grad.isfinite().all()
                assert parameter.grad.any()
        optimiser.step()
        optimiser.zero_grad()
    assert not losses or losses[-1] < losses[0] - 0.1
    return model, tuning


def predictions(model: PlannedLM, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch, Oracle())


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_lm_is_found_again_plain_and_bridged(
    family: str,
    tuning: str,
    fresh: Callable,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    tmp_path: Path,
):
    base, chosen = fresh(family), settings(tuning)
    with torch.no_grad():
        before = base.plain(batch.tokens).logits
    model, trained = tuned(base, batch, chosen)
    trained.save(tmp_path / "tuned")
    name = base.plain.name_or_path
    own = FrozenLM(
        lambda: TUNINGS[tuning].load(tmp_path / "tuned", lambda: load_model(name), chosen, torch.float32),
        load_config(name),
        tokenizer,
        "own",
        like=base,
    )
    expected = predictions(model, batch)
    for backend in (own.backend_for(model.adapter.names), BridgeBackend(own.bridged)):
        found = predictions(PlannedLM(backend, None, model.adapter, 1.0), batch)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    untuned = predictions(PlannedLM(BridgeBackend(base.bridged), None, model.adapter, 1.0), batch)
    assert not torch.allclose(untuned, expected, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(base.plain(batch.tokens).logits, before)
        torch.testing.assert_close(base.bridged(batch.tokens), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_begins_as_the_lm_and_trains_low_rank_updates_of_its_linear_maps(
    family: str, fresh: Callable, batch: Batch
):
    base = fresh(family)
    model = copy.deepcopy(base.plain)
    maps = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not model.get_output_embeddings()
    }
    assert len(maps) >= 3 * 4
    lora = TUNINGS["lora"](model, settings("lora", rank=2), 0)
    assert sum(p.numel() for p in lora.parameters) == sum(2 * sum(shape) for shape in maps.values())
    with torch.no_grad():
        torch.testing.assert_close(model(batch.tokens).logits, base.plain(batch.tokens).logits)


def test_the_update_is_scaled_by_two(fresh: Callable, tmp_path: Path):
    base, chosen = fresh("llama"), settings("lora", rank=2)
    lora = TUNINGS["lora"](copy.deepcopy(base.plain), chosen, 0)
    for parameter in lora.parameters:
        torch.nn.init.normal_(parameter)
    lora.save(tmp_path / "lora")
    updates = read_tensors(tmp_path / "lora" / LORA_WEIGHTS)
    merged = TUNINGS["lora"].load(tmp_path / "lora", lambda: copy.deepcopy(base.plain), chosen, torch.float32)
    name = "model.layers.1.mlp.up_proj"
    down, up = (updates[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    weight = base.plain.get_submodule(name).weight
    torch.testing.assert_close(merged.get_submodule(name).weight, weight + 2.0 * up @ down)


def test_the_seed_decides_how_updates_begin(fresh: Callable):
    base = fresh("gpt2")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, same, other = (
        TUNINGS["lora"](copy.deepcopy(base.plain), settings("lora"), seed).parameters[0] for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_others_read_what_was_tuned(fresh: Callable, batch: Batch, tmp_path: Path):
    """Low-rank updates with peft alone, all weights with Transformers alone."""
    base = fresh("gpt2")
    _, lora = tuned(base, batch, settings("lora"))
    lora.save(tmp_path / "lora")
    _, full = tuned(base, batch, settings("full"))
    full.save(tmp_path / "full")
    models = {
        lora: PeftModel.from_pretrained(load_model(base.plain.name_or_path), tmp_path / "lora"),
        full: AutoModelForCausalLM.from_pretrained(tmp_path / "full"),
    }
    for tuning, model in models.items():
        with torch.no_grad():
            torch.testing.assert_close(
                model.eval()(batch.tokens).logits, tuning.model(batch.tokens).logits, atol=1e-5, rtol=1e-5
            )
    for folder in ("lora", "full"):
        assert not [path for path in (tmp_path / folder).iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
        modes = {path.stat().st_mode for path in (tmp_path / folder).iterdir()}
        assert len(modes) == 1, "who may read the settings may read the weights"
        for path in (tmp_path / folder).glob("*.json"):
            assert str(tmp_path.parent) not in path.read_text(), "a run may be moved"
            assert base.plain.name_or_path not in path.read_text()


def other_rank(folder: Path, model: PreTrainedModel) -> TuningSettings:
    return settings("lora", rank=3)


def fewer_updates(folder: Path, model: PreTrainedModel) -> TuningSettings:
    tensors = read_tensors(folder / LORA_WEIGHTS)
    write_tensors(folder / LORA_WEIGHTS, dict(list(tensors.items())[2:]))
    return settings("lora")


def more_updates(folder: Path, model: PreTrainedModel) -> TuningSettings:
    tensors = read_tensors(folder / LORA_WEIGHTS)
    write_tensors(folder / LORA_WEIGHTS, tensors | {"base_model.model.other.lora_A.weight": torch.ones(2, 2)})
    return settings("lora")


def no_weights(folder: Path, model: PreTrainedModel) -> TuningSettings:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return settings("full")


@pytest.mark.parametrize("harm", [other_rank, fewer_updates, more_updates, no_weights])
def test_what_does_not_fit_is_refused(harm: Callable, fresh: Callable, tmp_path: Path):
    base = fresh("gpt2")
    tuning = "full" if harm is no_weights else "lora"
    trained = TUNINGS[tuning](copy.deepcopy(base.plain), settings(tuning), 0)
    trained.save(tmp_path / "tuned")
    chosen = harm(tmp_path / "tuned", base.plain)
    with pytest.raises(ProbekitError, match=r"tuned does not fit the run's LM and settings") as raised:
        TUNINGS[tuning].load(tmp_path / "tuned", lambda: copy.deepcopy(base.plain), chosen, torch.float32)
    assert "\n" not in str(raised.value)


def test_saving_and_loading_show_no_bars(fresh: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    logging.enable_progress_bar()
    base = fresh("gpt2")
    model = copy.deepcopy(base.plain)
    capsys.readouterr()
    trained = TUNINGS["full"](model, settings("full"), 0)
    trained.save(tmp_path / "tuned")
    TUNINGS["full"].load(tmp_path / "tuned", lambda: model, settings("full"), torch.float32)
    assert not capsys.readouterr().err
    type(model).from_pretrained(tmp_path / "tuned")
    assert "%|" in capsys.readouterr().err, "or there is nothing to hide"


@pytest.mark.parametrize("trusted", [False, True])
def test_all_weights_of_an_lm_with_code_of_its_own(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`lm.trust_remote_code` holds for the tuned LM, too."""
    asked: list[bool] = []

    def load(folder: Path, **arguments: object) -> None:
        asked.append(bool(arguments["trust_remote_code"]))
        raise ValueError("no LM")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(ProbekitError, match="does not fit the run's LM"):
        TUNINGS["full"].load(tmp_path, Mock(), settings("full"), torch.float32, trust_remote_code=trusted)
    assert asked == [trusted]
