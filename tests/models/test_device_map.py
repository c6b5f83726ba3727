"""LMs that accelerate placed over main memory and disk compute what they compute on one device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from probekit.config import ConditioningSettings, Config, TuningSettings
from probekit.data.corpus import Corpus
from probekit.data.windows import Batch, collate, cut_windows
from probekit.errors import ProbekitError
from probekit.evaluation.evaluate import evaluate
from probekit.generation.generate import generate
from probekit.models.backends import HFBackend
from probekit.models.conditioning import CONDITIONINGS, new_adapter
from probekit.models.decoding import GrowingText, new_decoder
from probekit.models.frozen_lm import FrozenLM
from probekit.models.language_model import load_model, random_weights
from probekit.models.locations import hook_name
from probekit.models.mixing import Oracle
from probekit.models.planned_lm import PlannedLM, token_losses
from probekit.models.pretrained import load_config
from probekit.models.tuning import TUNINGS
from probekit.probing.probe import probe
from probekit.run.run import Run
from probekit.training.train import train

CPU = torch.device("cpu")
DEVICE_MAPS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"transformer.wte": "cpu", "transformer.wpe": "disk", "transformer.ln_f": "disk", "lm_head": "cpu"},
        **{"transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.h.2": "disk"},
    },
    "llama": {
        **{"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"},
        **{"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"},
    },
}
LOCATIONS = ("hook_resid_pre", "attn.hook_z", "hook_mlp_out", "hook_resid_post")
NAMES = ["hook_embed", "ln_final.hook_out", *(hook_name(at, layer) for layer in range(3) for at in LOCATIONS)]


@pytest.fixture(scope="module")
def batch(make_corpus: Callable[..., Corpus]) -> Batch:
    corpus = make_corpus([[3, 2, 4], [1, 1, 5, 2]])
    return collate(corpus, cut_windows(corpus, np.arange(2), 32, 32))


@pytest.fixture(scope="module")
def pair(folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[FrozenLM]]:
    """An LM in main memory, and the same over main memory and disk."""

    def make(family: str) -> list[FrozenLM]:
        name, device_map = str(folders[family]), DEVICE_MAPS[family]
        config = load_config(name)
        placed = FrozenLM(
            lambda: load_model(name, device_map=device_map), config, tokenizer, family, device=CPU
        )
        assert any(parameter.is_meta for parameter in placed.plain.parameters())
        return [FrozenLM(lambda: load_model(name), config, tokenizer, family), placed]

    return make


def activations(lm: FrozenLM, batch: Batch) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    backend = lm.backend_for(NAMES)
    assert isinstance(backend, HFBackend)
    with torch.no_grad():
        backend(batch.tokens, [(n, lambda x, n=n: seen.update({n: x.clone()})) for n in NAMES], len(NAMES))
    return seen


@pytest.mark.parametrize("family", DEVICE_MAPS)
def test_logits_and_activations_are_the_same(family: str, pair: Callable, batch: Batch):
    whole, placed = pair(family)
    assert (placed.layers, placed.heads) == (whole.layers, whole.heads) == (3, 2)
    assert placed.architecture == whole.architecture
    expected, found = (activations(lm, batch) for lm in (whole, placed))
    assert all(found[name].equal(value) for name, value in expected.items())
    with torch.no_grad():
        expected, found = (lm.backend_for(NAMES).logits(batch.tokens, []) for lm in (whole, placed))
    assert expected.equal(found)


@pytest.mark.parametrize("family", DEVICE_MAPS)
def test_random_weights_are_the_same(family: str, pair: Callable, batch: Batch):
    maps = [getattr(lm.plain, "hf_device_map", None) for lm in pair(family)]
    expected, found = (random_weights(pair(family)[0].config, 3, torch.float32, each) for each in maps)
    assert any(parameter.is_meta for parameter in found.parameters())
    with torch.no_grad():
        assert expected.eval()(batch.tokens).logits.equal(found.eval()(batch.tokens).logits)


@pytest.mark.parametrize("tuning", ["frozen", "lora"])
@pytest.mark.parametrize("kind", CONDITIONINGS)
@pytest.mark.parametrize("family", DEVICE_MAPS)
def test_gradients_are_the_same(family: str, kind: str, tuning: str, pair: Callable, batch: Batch):
    settings = TuningSettings(tuning=tuning, rank=2)
    codebook = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    gradients: list[list[Tensor]] = []
    for lm in pair(family):
        adapter = new_adapter(ConditioningSettings(kind=kind, skip_layers=1), codebook, lm, seed=0)
        base = None if tuning == "frozen" else TUNINGS[tuning](lm.plain, settings, 0)
        model = PlannedLM(lm.backend_for(adapter.names, lm.plain), None, adapter, 1.0)
        tuned = [] if base is None else base.parameters
        for i, parameter in enumerate(tuned):  # updates' second halves are zero at first
            parameter.requires_grad_(True)
            generator = torch.Generator().manual_seed(i)
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        token_losses(model(batch, Oracle()), batch.targets).mean().backward()
        gradients.append([p.grad for p in [*adapter.parameters(), *tuned]])
    expected, found = gradients
    assert len(expected) == len(found) >= (2 + 24 if tuning == "lora" else 2)
    assert all(gradient.any() for gradient in expected)
    assert all(one.equal(other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("family", DEVICE_MAPS)
def test_lora_begins_the_same_and_is_found_again(family: str, pair: Callable, batch: Batch, tmp_path: Path):
    settings = TuningSettings(tuning="lora", rank=2)
    logits = []
    for i, lm in enumerate(pair(family)):
        lora = TUNINGS["lora"](lm.plain, settings, 0)
        for parameter in lora.parameters:
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        lora.save(tmp_path / str(i))
        again = TUNINGS["lora"].load(tmp_path / str(i), lm._load, settings, torch.float32)
        with torch.no_grad():
            logits += [model.eval()(batch.tokens).logits for model in (lora.model, again)]
    for found in logits[1:]:
        torch.testing.assert_close(found, logits[0], atol=1e-5, rtol=1e-5)


def test_growing_texts_are_read_with_a_cache(pair: Callable):
    codebook = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for lm in pair("llama"):
        adapter = new_adapter(ConditioningSettings(skip_layers=1), codebook, lm, seed=0)
        backend = lm.backend_for(adapter.names)
        decoder = new_decoder(PlannedLM(backend, None, adapter, 1.0), backend, 8)
        assert decoder.cached
        texts = [GrowingText([5, 6, 7], [0, 1, 1], list(codebook)), GrowingText([8], [2], list(codebook))]
        with torch.no_grad():
            for token in range(9):
                found.append(decoder(texts))
                for text in texts:
                    text.tokens.append(token)
                    text.carried.append(token % 3)
    for one, other in zip(found[:9], found[9:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_hook_that_only_the_bridge_has_is_refused(pair: Callable):
    _, placed = pair("gpt2")
    with pytest.raises(ProbekitError, match=r"lm.device_map is set, but only TransformerLens has blocks"):
        placed.backend_for(["blocks.2.attn.hook_pattern"])


def test_every_command_runs_a_placed_lm(
    tiny_run: Run, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The setting names a device; the loader gets a map over main memory and disk in its place."""
    settings = {
        "lm.name": str(folders["llama"]),
        "mixing.variants": ["soft"],
        "conditioning.skip_layers": 1,
        "training.window": 16,
        "training.planner.epochs": 1,
        "training.adapter.epochs": 1,
        "evaluation.window": 16,
        "probe.variants": ["none", "random", "soft"],
        "probe.layers": [0, 2],
        "probe.positions": [1],
        "probe.solvers": ["ridge"],
        "probe.code_length": False,
    }
    tables = []
    for placed in (False, True):
        chosen = settings | ({"lm.device_map": "cpu"} if placed else {})
        if placed:
            monkeypatch.setattr(
                "probekit.run.run.load_model",
                lambda name, **given: load_model(name, **given | {"device_map": DEVICE_MAPS["llama"]}),
            )
        run = train(tiny_run.config.override(chosen), tmp_path / str(placed), quiet=True)
        assert any(parameter.is_meta for parameter in run.plain_model().parameters()) == placed
        evaluated = evaluate(run, quiet=True)
        written = [text.text for text in generate(run, ["The plan", "A text"], variant="soft", tokens=8)]
        tables.append((run.metrics(), evaluated.perplexity, probe(run, quiet=True).table, written))
    (rows, evaluated, probed, written), placed = tables
    np.testing.assert_allclose(placed[0].validation_loss, rows.validation_loss, rtol=1e-5)
    np.testing.assert_allclose(placed[1].perplexity, evaluated.perplexity, rtol=1e-5)
    np.testing.assert_allclose(placed[2].accuracy, probed.accuracy, atol=1e-6)
    assert placed[3] == written


def test_what_cannot_be_placed_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ProbekitError, match=r"lm.device_map is 'auto', but training.base.tuning is 'full'"):
        Config().override({"lm.device_map": "auto", "training.base.tuning": "full"})
    with pytest.raises(ProbekitError, match=r"lm.device_map is 'auto', but method is 'depth-ensemble'"):
        Config().override({"lm.device_map": "auto", "method": "depth-ensemble"})
    with pytest.raises(ProbekitError, match=r"with lm.device_map 'nowhere'"):
        load_model(str(folders["gpt2"]), device_map="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(ProbekitError, match=r"with lm.device_map 'cuda:0'; .*(CUDA|NVIDIA)"):
            load_model(str(folders["gpt2"]), device_map="cuda:0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProbekitError, match=r"lm.device_map is 'auto', but 2 processes run"):
        load_model(str(folders["gpt2"]), device_map="auto")


def test_auto_places_all_in_main_memory_where_it_fits(folders: dict[str, Path], batch: Batch):
    plain, placed = (load_model(str(folders["gpt2"]), device_map=given) for given in (None, "auto"))
    with torch.no_grad():
        assert plain(batch.tokens).logits.equal(placed(batch.tokens).logits)
