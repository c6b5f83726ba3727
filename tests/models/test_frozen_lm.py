"""A frozen LM holds its weights once, loads none to look up its hooks, and is read in float32."""

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probekit.config import ConditioningSettings, TuningSettings
from probekit.data.corpus import Corpus
from probekit.data.windows import Batch, collate, cut_windows
from probekit.errors import ProbekitError
from probekit.models.backends import BridgeBackend, HFBackend
from probekit.models.conditioning import new_adapter
from probekit.models.decoding import GrowingText, HFDecoder, new_decoder
from probekit.models.frozen_lm import FrozenLM
from probekit.models.language_model import bridge, load_model
from probekit.models.locations import hook_name
from probekit.models.mixing import Oracle
from probekit.models.planned_lm import PlannedLM, token_losses
from probekit.models.pretrained import load_config
from probekit.models.tuning import TUNINGS
from probekit.run.run import Run

NAMES = [hook_name(f"hook_{name}", layer) for layer in range(3) for name in ("attn_out", "resid_post")]


@pytest.fixture(scope="module")
def batch(make_corpus: Callable[..., Corpus]) -> Batch:
    corpus = make_corpus([[3, 2, 4], [1, 1, 5, 2]])
    return collate(corpus, cut_windows(corpus, np.arange(2), 32, 32))


@pytest.fixture
def make_lm(folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase) -> Callable[..., FrozenLM]:
    """An LM of a test's own, and the weights that were loaded for it."""

    def make(family: str, loaded: list[Any] | None = None, dtype: torch.dtype = torch.float32) -> FrozenLM:
        def load() -> PreTrainedModel:
            model = load_model(str(folders[family]), dtype=dtype)
            if loaded is not None:
                loaded.append(weakref.ref(model.get_input_embeddings().weight))
            return model

        return FrozenLM(load, load_config(str(folders[family])), tokenizer, family)

    return make


def held(loaded: list[Any]) -> list[bool]:
    gc.collect()
    return [weights() is not None for weights in loaded]


def test_looking_up_loads_nothing(make_lm: Callable[..., FrozenLM]):
    loaded: list[Any] = []
    lm = make_lm("llama", loaded)
    lm.architecture.check("hook_attn_out", "probe.locations")
    assert (lm.layers, lm.heads, loaded) == (3, 2, [])


def test_weights_are_held_once(make_lm: Callable[..., FrozenLM]):
    loaded: list[Any] = []
    lm = make_lm("gpt2", loaded)
    for _ in range(2):
        assert isinstance(lm.backend_for(NAMES), HFBackend)
    assert held(loaded) == [True]
    bridged = lm.backend_for([*NAMES, "blocks.1.attn.hook_q"])
    assert isinstance(bridged, BridgeBackend)
    assert held(loaded) == [False, True]
    lm.let_go()
    del bridged
    assert held(loaded) == [False, False]


def test_a_run_holds_the_weights_of_one_lm(tiny_run: Run):
    run = Run.open(tiny_run.folder)
    first = weakref.ref(run.backend_for(NAMES).model.lm_head.weight)
    other = run.backend_for(NAMES, "random").model
    gc.collect()
    assert first() is None
    assert not torch.equal(other.lm_head.weight, run.backend_for(NAMES).model.lm_head.weight)


@pytest.mark.parametrize("bridged", [False, True])
def test_hooks_and_logits_are_float32(bridged: bool, make_lm: Callable[..., FrozenLM], batch: Batch):
    whole, half = (make_lm("llama", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    seen: list[dict[str, Tensor]] = []
    logits: list[Tensor] = []
    for lm in (whole, half):
        backend = BridgeBackend(lm.bridged) if bridged else lm.backend_for(NAMES)
        assert backend.model.dtype == (torch.float32 if lm is whole else torch.bfloat16)
        seen.append({})
        hooks = [(name, lambda x, name=name: seen[-1].update({name: x.clone()})) for name in NAMES]
        with torch.no_grad():
            backend(batch.tokens, hooks, len(hooks))
            logits.append(backend.logits(batch.tokens, [(NAMES[0], lambda x: 1.5 * x)]))
    for name, value in seen[1].items():
        assert value.dtype == torch.float32
        assert (value - seen[0][name]).norm() < 0.05 * seen[0][name].norm()
    assert logits[1].dtype == torch.float32
    assert 0 < (logits[1] - logits[0]).norm() < 0.05 * logits[0].norm()


def test_texts_grow_with_a_cache_in_bfloat16(make_lm: Callable[..., FrozenLM]):
    lm = make_lm("llama", dtype=torch.bfloat16)
    adapter = new_adapter(ConditioningSettings(skip_layers=1), torch.randn(5, 3), lm, seed=0)
    model = PlannedLM(lm.backend_for(adapter.names), None, adapter, 1.0)
    decoder = new_decoder(model, model.backend, 8)
    assert isinstance(decoder, HFDecoder)
    assert decoder.cached
    text = GrowingText([5, 6, 7], [0, 1, 1], list(adapter.codebook.detach()))
    with torch.no_grad():
        assert decoder([text]).dtype == torch.float32


@pytest.mark.parametrize("tuning", ["frozen", "lora"])
def test_on_a_bfloat16_lm_float32_is_trained(
    tuning: str, make_lm: Callable[..., FrozenLM], batch: Batch, tmp_path: Path
):
    """Updates are kept beside the weights, in which small ones would be rounded away."""
    lm, settings = make_lm("llama", dtype=torch.bfloat16), TuningSettings(tuning=tuning, rank=2)
    adapter = new_adapter(ConditioningSettings(skip_layers=1), torch.randn(5, 3), lm, seed=0)
    tuned = None if tuning == "frozen" else TUNINGS[tuning](lm._load(), settings, 0)
    backend = lm.backend_for(adapter.names, tuned and tuned.model)
    parameters = [*adapter.parameters(), *([] if tuned is None else tuned.parameters)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    model, losses = PlannedLM(backend, None, adapter, 1.0), []
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(6):
        loss = token_losses(model(batch, Oracle()), batch.targets).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    if tuned is None:
        return
    tuned.save(tmp_path / "lora")
    again = TUNINGS["lora"].load(tmp_path / "lora", lm._load, settings, torch.bfloat16)
    found = PlannedLM(lm.backend_for(adapter.names, again), None, adapter, 1.0)
    with torch.no_grad():
        assert torch.equal(found(batch, Oracle()), model(batch, Oracle()))
    with pytest.raises(ProbekitError, match="cannot run LoRA's updates beside weights of bfloat16"):
        FrozenLM(lambda: again, lm.config, lm._tokenizer, "lora", like=lm).bridged  # noqa: B018


def test_a_bridge_that_computes_other_logits_on_the_corpus_is_refused(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    sample, bridged = torch.arange(1, 21)[None], []
    for name, settings in (("Falcon", {"alibi": True}), ("Llama", {"num_key_value_heads": 1})):
        model = make_model(name, len(tokenizer), **settings)
        load = partial(copy.deepcopy, model)
        lm = FrozenLM(load, model.config, tokenizer, name, sample=sample)
        if name == "Llama":
            bridged.append(lm.bridged)
            continue
        with pytest.raises(ProbekitError) as raised:
            bridged.append(lm.bridged)
        message = str(raised.value)
        assert message.startswith(
            "lm.name 'Falcon': on 20 tokens of the corpus TransformerLens computes other"
        )
        share = float(message.split("differ by ")[1].split("%")[0])
        own = HFBackend(model, {}).logits(sample, [])
        other = BridgeBackend(bridge(load(), tokenizer, name)).logits(sample, [])
        assert share == pytest.approx(100 * float((own - other).abs().max() / own.abs().max()), abs=0.1)
    assert len(bridged) == 1


def test_a_run_compares_a_bridge_on_its_corpus(tiny_run: Run):
    lm, corpus = Run.open(tiny_run.folder).frozen_lm(), tiny_run.corpus
    assert lm._sample.tolist() == [corpus.tokens[:48].tolist()]  # the LM's positions
    assert isinstance(lm.backend_for(["blocks.1.attn.hook_q"]), BridgeBackend)
