"""Hook points, and the two backends: the plain module gives what the bridge gives; neither leaves traces."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probekit.models.backends import Backend, BridgeBackend, HFBackend, Hook
from probekit.models.hook_points import Architecture, examine
from probekit.models.language_model import bridge, load_model
from probekit.models.locations import BEFORE, LABELS, OUTSIDE_BLOCKS, hook_name, layer_of

FAMILIES = ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen2", "qwen3"]
LAYERS = 3
TOKENS = torch.randint(200, (4, 11), generator=torch.Generator().manual_seed(0))


KNOWN: dict[str, Architecture] = {}


def architecture_of(lm: TransformerBridge) -> Architecture:
    config = lm.original_model.config
    if config.model_type not in KNOWN:
        KNOWN[config.model_type] = examine(config, lm.tokenizer, "tiny")
    return KNOWN[config.model_type]


def backend_for(lm: TransformerBridge, model: PreTrainedModel, names: Sequence[str]) -> Backend:
    points = architecture_of(lm).points(names)
    return BridgeBackend(lm) if points is None else HFBackend(model, points)


def table_names(lm: TransformerBridge) -> list[str]:
    """Full names of the table's locations at all layers, as far as the architecture has them."""
    there = architecture_of(lm).locations
    names = [name.removesuffix(BEFORE) for name in LABELS if name.removesuffix(BEFORE) in there]
    return sorted({hook_name(name, layer) for name in names for layer in range(LAYERS)})


def seen_by(backend: Backend, names: Sequence[str], changes: Sequence[Hook] = ()) -> dict[str, Tensor]:
    """What hooks at some names see, after hooks that change activations."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Hook:
        return name, lambda x: seen.update({name: x.flatten(2).clone()})

    with torch.no_grad():
        backend(TOKENS, [*changes, *map(look, names)], len(names))
    return seen


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-4, msg=name)


def shift(name: str, seed: int) -> Hook:
    """A hook that adds another vector at every position, of any shape."""

    def add(activation: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return activation + torch.randn(activation.flatten(2).shape, generator=generator).view_as(activation)

    return name, add


@pytest.mark.parametrize("family", FAMILIES)
def test_every_location_of_the_table_is_read_the_same(family: str, bridged: dict, plain: dict):
    names = table_names(bridged[family])
    assert len(names) == 2 + LAYERS * (5 if family == "gpt_neox" else 6)
    backend = backend_for(bridged[family], plain[family], names)
    assert isinstance(backend, HFBackend)
    assert_same(seen_by(backend, names), seen_by(BridgeBackend(bridged[family]), names))


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_are_hugging_faces_hidden_states(family: str, bridged: dict, plain: dict):
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(LAYERS)] + ["ln_final.hook_out"]
    seen = seen_by(backend_for(bridged[family], plain[family], names), names)
    with torch.no_grad():
        states = plain[family](TOKENS, output_hidden_states=True).hidden_states
    assert_same(seen, dict(zip(names, states, strict=True)))


@pytest.mark.parametrize("location", [name for name in LABELS if not name.endswith(BEFORE)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_anywhere_reaches_all_that_is_behind_it(
    family: str, location: str, bridged: dict, plain: dict
):
    if location not in architecture_of(bridged[family]).locations:
        assert (family, location) == ("gpt_neox", "hook_resid_mid")
        return
    names = table_names(bridged[family])
    changes = [shift(name, seed) for seed, name in enumerate({hook_name(location, n): 0 for n in (0, 2)})]
    backend = backend_for(bridged[family], plain[family], names)
    found = seen_by(backend, names, changes)
    assert_same(found, seen_by(BridgeBackend(bridged[family]), names, changes))
    untouched = seen_by(backend, names)
    changed = {name for name in names if not torch.equal(found[name], untouched[name])}
    assert "ln_final.hook_out" in changed
    assert {name for name, _ in changes} <= changed
    if location not in ("hook_embed", "hook_resid_pre"):
        assert "blocks.0.hook_resid_pre" not in changed


def test_hooks_run_in_their_order(bridged: dict, plain: dict):
    name = "blocks.1.attn.hook_z"
    seen: list[Tensor] = []
    hooks: list[Hook] = [
        (name, lambda x: seen.append(x.flatten(2).clone())),
        (name, lambda x: 2 * x),
        (name, lambda x: x + 1),
        (name, lambda x: seen.append(x.flatten(2).clone())),
    ]
    for backend in (backend_for(bridged["gpt2"], plain["gpt2"], [name]), BridgeBackend(bridged["gpt2"])):
        seen.clear()
        with torch.no_grad():
            backend(TOKENS, hooks, 2)
        before, after = seen
        torch.testing.assert_close(after, 2 * before + 1)


@pytest.mark.parametrize(
    ("names", "called"),
    [
        (["hook_embed"], []),
        (["blocks.0.hook_resid_pre"], []),
        (["blocks.0.hook_resid_post"], ["0.attn", "0.mlp"]),
        (["blocks.1.attn.hook_z"], ["0.attn", "0.mlp"]),
        (["blocks.1.hook_attn_out"], ["0.attn", "0.mlp", "1.attn"]),
        (["blocks.1.hook_attn_out", "blocks.0.hook_mlp_out"], ["0.attn", "0.mlp", "1.attn"]),
        (["ln_final.hook_out"], ["0.attn", "0.mlp", "1.attn", "1.mlp", "2.attn", "2.mlp"]),
    ],
)
def test_nothing_behind_the_last_read_is_computed(
    names: list[str], called: list[str], bridged: dict, folders: dict[str, Path]
):
    model = load_model(str(folders["gpt2"]))
    backend = backend_for(bridged["gpt2"], model, names)
    assert isinstance(backend, HFBackend)
    done: list[str] = []
    for path, module in model.named_modules():
        short = path.removeprefix("transformer.h.")
        if short in {f"{layer}.{part}" for layer in range(LAYERS) for part in ("attn", "mlp")}:
            module.register_forward_hook(lambda *_, short=short: done.append(short))
    model.lm_head.register_forward_hook(lambda *_: done.append("head"))
    seen = seen_by(backend, names)
    assert sorted(seen) == sorted(names)
    assert done == called
    with torch.no_grad():  # a pass that was broken off leaves a whole model
        model(TOKENS)
    assert done[len(called) :] == [
        *(f"{n}.{part}" for n in range(LAYERS) for part in ("attn", "mlp")),
        "head",
    ]


def test_a_change_alone_runs_to_the_end(bridged: dict, plain: dict):
    """Nothing is read, so nothing ends the pass early."""
    backend = backend_for(bridged["gpt2"], plain["gpt2"], ["blocks.2.hook_mlp_out"])
    times: list[int] = []

    def change(activation: Tensor) -> Tensor:
        times.append(1)
        return activation

    with torch.no_grad():
        backend(TOKENS, [("blocks.2.hook_mlp_out", change)], 0)
    assert times == [1]


def test_the_bridge_stops_behind_the_last_layer_with_a_hook(folders: dict[str, Path], tokenizer):
    lm = bridge(load_model(str(folders["gpt2"])), tokenizer, "tiny")
    done: list[int] = []
    for layer, block in enumerate(lm.original_model.transformer.h):
        block.register_forward_hook(lambda *_, layer=layer: done.append(layer))
    for name, layers in [
        ("blocks.0.attn.hook_q", [0]),
        ("blocks.1.hook_resid_mid", [0, 1]),
        ("blocks.2.hook_resid_pre", [0, 1, 2]),
        ("ln_final.hook_out", [0, 1, 2]),
    ]:
        done.clear()
        assert list(seen_by(BridgeBackend(lm), [name])) == [name]
        assert done == layers, name


def hooked(model: torch.nn.Module) -> list[str]:
    """Modules with hooks."""
    return [path for path, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_no_hook_stays_behind(fast: bool, fails: bool, folders: dict[str, Path], tokenizer):
    model = load_model(str(folders["llama"]))
    lm = bridge(load_model(str(folders["llama"])), tokenizer, "tiny")
    names = table_names(lm)
    with torch.no_grad():
        lm(TOKENS)  # the bridge hooks its norms once
    before = hooked(model), hooked(lm)
    backend = backend_for(lm, model, names) if fast else BridgeBackend(lm)
    assert isinstance(backend, HFBackend) == fast
    assert (hooked(model), hooked(lm)) == before

    def look(activation: Tensor) -> None:
        if fails:
            raise RuntimeError("out of memory")

    hooks: list[Hook] = [("blocks.0.attn.hook_z", lambda x: 0 * x), *((name, look) for name in names)]
    with torch.no_grad():
        clean = model(TOKENS).logits, lm(TOKENS)
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                backend(TOKENS, hooks, len(names))
        else:
            backend(TOKENS, hooks, len(names))
        assert (hooked(model), hooked(lm)) == before
        assert not any(point.fwd_hooks for point in lm.hook_dict.values())
        assert torch.equal(model(TOKENS).logits, clean[0])
        assert torch.equal(lm(TOKENS), clean[1])


def test_a_plain_pass_is_frozen_and_without_dropout(
    bridged: dict, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    model = make_model("GPT2", len(tokenizer), resid_pdrop=0.5).train()
    backend = backend_for(bridged["gpt2"], model, ["blocks.2.hook_resid_post"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    first, second = (seen_by(backend, ["blocks.2.hook_resid_post"]) for _ in range(2))
    assert torch.equal(*first.values(), *second.values())


def test_hooks_by_location_and_layer():
    names = [hook_name(location, 12) for location in ("attn.hook_z", "hook_resid_pre", *OUTSIDE_BLOCKS)]
    assert names == ["blocks.12.attn.hook_z", "blocks.12.hook_resid_pre", "hook_embed", "ln_final.hook_out"]
    assert [layer_of(name) for name in names] == [12, 12, 0, None]
