"""Depth ensembles against their definition: logits layer by layer, losses written out at once."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probekit.config import DepthSettings, DistillationSettings, MemberName
from probekit.data.windows import collate, cut_windows
from probekit.errors import ProbekitError
from probekit.models import unembedding
from probekit.models.backends import BridgeBackend
from probekit.models.decoding import Decoder, GrowingText, HFDecoder, new_decoder
from probekit.models.depth_ensemble import (
    DepthEnsemble,
    DepthLoss,
    LateLayers,
    chunked_sum,
    final_norm,
    layer_losses,
    new_ensemble,
)
from probekit.models.frozen_lm import FrozenLM
from probekit.models.language_model import load_model
from probekit.models.mixing import Fixed
from probekit.models.planned_lm import PlannedLM

FAMILIES = ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen2", "qwen3"]
DEPTH = 3


@pytest.fixture(scope="module")
def batch(make_corpus):
    corpus = make_corpus([[3, 2, 4], [1, 1, 5, 2]])
    return collate(corpus, cut_windows(corpus, torch.arange(2).numpy(), 32, 32))


def ensemble_on(lm: FrozenLM, member: MemberName = "ensemble", **settings: object) -> DepthEnsemble:
    return new_ensemble(member, DepthSettings(**{"layers": DEPTH, **settings}), lm, lm.plain, seed=0)


def scrambled(ensemble: DepthEnsemble) -> DepthEnsemble:
    """The same with norms and a router that say something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ensemble.trained:
            parameter += 0.7 * torch.randn(parameter.shape, generator=generator)
    return ensemble


def forced(ensemble: DepthEnsemble) -> DepthEnsemble:
    """The same with all weight on the last layer."""
    with torch.no_grad():
        ensemble.router.weight.zero_()
        ensemble.router.bias.fill_(-1e9)
        ensemble.router.bias[-1] = 0.0
    return ensemble


def hidden_states(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """What every block gives, by hooks on the modules that Transformers calls its layers."""
    (blocks,) = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == DEPTH]
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def naive(lm: FrozenLM, ensemble: DepthEnsemble, tokens: Tensor, top_k: int | None) -> Tensor:
    """All layers' logits, weighted one by one, as the paper writes it."""
    norm = final_norm(lm, lm.plain)
    head = lm.plain.get_output_embeddings()
    states = [norm(h) for h in hidden_states(lm.plain, tokens)]
    scores = states[-1] @ ensemble.router.weight.T + ensemble.router.bias
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    if top_k is not None:
        least = weights.sort(dim=-1, descending=True).values[..., top_k - 1 : top_k]
        weights = torch.where(weights >= least, weights, 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
    layers = [
        head(state * scale + shift)
        for state, scale, shift in zip(states, ensemble.scale, ensemble.shift, strict=True)
    ]
    return sum(weights[..., i : i + 1] * logits for i, logits in enumerate(layers))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_weight_on_the_last_layer_gives_the_lm_s_logits(family: str, fast: bool, base, batch):
    lm = base(family)
    ensemble = forced(ensemble_on(lm))
    backend = lm.backend_for(ensemble.names) if fast else BridgeBackend(lm.bridged)
    model = PlannedLM(backend, None, None, 1.0, depth=ensemble)
    with torch.no_grad():
        expected = lm.plain(batch.tokens, use_cache=False).logits
        torch.testing.assert_close(model(batch, Fixed()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_alone_is_the_lm_before_training(family: str, base, batch):
    lm = base(family)
    model = PlannedLM(BridgeBackend(lm.bridged), None, None, 1.0, depth=ensemble_on(lm, "plain"))
    with torch.no_grad():
        expected = lm.plain(batch.tokens, use_cache=False).logits
        torch.testing.assert_close(model(batch, Fixed()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_weighted_sum_of_layers_logits(family: str, top_k: int | None, base, batch):
    lm = base(family)
    ensemble = scrambled(ensemble_on(lm, top_k=top_k))
    with torch.no_grad():
        expected = naive(lm, ensemble, batch.tokens, top_k)
        for backend in (BridgeBackend(lm.bridged), lm.backend_for(ensemble.names)):
            model = PlannedLM(backend, None, None, 1.0, depth=ensemble)
            torch.testing.assert_close(model(batch, Fixed()), expected, rtol=1e-4, atol=1e-4)


def test_members_read_the_layers_they_say(base):
    lm = base("gpt2")
    assert ensemble_on(lm, "plain").layers == (2,)
    assert ensemble_on(lm, "repeated", layers=2).layers == (2, 2)
    assert ensemble_on(lm, "ensemble", layers=2).layers == (1, 2)
    trained = [sum(p.numel() for p in ensemble_on(lm, m).trained) for m in ("repeated", "ensemble")]
    assert trained[0] == trained[1] == 3 * 16 * 2 + 3 * 16 + 3
    assert ensemble_on(lm, "ensemble").read_names == (
        "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "ln_final.hook_in",
    )  # fmt: skip


def test_a_layer_that_is_repeated_is_weighed_as_often(base, batch):
    lm = base("llama")
    ensemble = scrambled(ensemble_on(lm, "repeated"))
    norm, head = final_norm(lm, lm.plain), lm.plain.get_output_embeddings()
    with torch.no_grad():
        state = norm(hidden_states(lm.plain, batch.tokens)[-1])
        weights = torch.softmax(state @ ensemble.router.weight.T + ensemble.router.bias, dim=-1)
        expected = sum(
            weights[..., i : i + 1] * head(state * ensemble.scale[i] + ensemble.shift[i]) for i in range(3)
        )
        model = PlannedLM(BridgeBackend(lm.bridged), None, None, 1.0, depth=ensemble)
        torch.testing.assert_close(model(batch, Fixed()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last_weight", [0.2, 0.9])
def test_the_router_begins_about_where_it_is_meant_to(last_weight: float, base, batch):
    lm = base("gpt2")
    ensemble = ensemble_on(lm, last_weight=last_weight)
    model = PlannedLM(BridgeBackend(lm.bridged), None, None, 1.0, depth=ensemble)
    with torch.no_grad():
        weights = ensemble(model.late_hidden(batch, Fixed())).weights
    assert weights[..., -1].mean().item() == pytest.approx(last_weight, abs=0.05)
    assert weights.sum(-1).flatten().tolist() == pytest.approx([1.0] * weights[..., 0].numel())


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_growing_texts_with_keys_and_values_kept(family: str, base):
    lm = base(family)
    model = PlannedLM(BridgeBackend(lm.bridged), None, None, 1.0, depth=scrambled(ensemble_on(lm))).eval()
    fast = new_decoder(model, lm.backend_for(model.names), 8)
    assert isinstance(fast, HFDecoder)
    assert fast.cached
    slow = Decoder(model, 8)
    texts = [GrowingText([3, 1, 4], [0] * 3, []), GrowingText([5], [0], [])]
    with torch.no_grad():
        for step in range(9):
            torch.testing.assert_close(fast(texts), slow(texts), rtol=1e-4, atol=1e-4)
            for text in texts:
                text.tokens.append(7 + step)
                text.carried.append(0)


def test_more_layers_than_there_are(base):
    with pytest.raises(ProbekitError, match=r"depth\.layers is 4, but the LM has 3 layers"):
        ensemble_on(base("gpt2"), layers=4)


def test_a_model_without_a_final_norm(folders: dict, tokenizer: PreTrainedTokenizerBase):
    model = load_model(str(folders["gpt2"]))
    lm = FrozenLM(lambda: model, model.config, tokenizer, "gpt2")
    vars(lm)["architecture"] = replace(lm.architecture, modules={})
    with pytest.raises(ProbekitError, match="no final norm"):
        ensemble_on(lm, layers=1)


def test_a_model_that_caps_its_logits(make_model, tokenizer: PreTrainedTokenizerBase):
    settings = {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.5}
    model = make_model("Gemma2", len(tokenizer), **settings).eval()
    lm = FrozenLM(lambda: model, model.config, tokenizer, "gemma")
    with pytest.raises(ProbekitError, match="caps or scales"):
        ensemble_on(lm, layers=1)


K, TOKENS, WIDTH, VOCABULARY = 3, 11, 5, 13


def parts(k: int = K, *, bias: bool = False) -> tuple[nn.Linear, dict[str, Tensor], Tensor]:
    """A head, what an ensemble is made of, and targets."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).double()
    leaves = {
        "states": torch.randn(k, TOKENS, WIDTH, dtype=torch.double, requires_grad=True),
        "scores": torch.randn(TOKENS, k, dtype=torch.double, requires_grad=True),
    }
    return head, leaves, torch.randint(VOCABULARY, (TOKENS,))


def late(leaves: dict[str, Tensor]) -> LateLayers:
    weights = leaves["scores"].softmax(-1)
    return LateLayers(leaves["states"], weights, torch.einsum("nk,knd->nd", weights, leaves["states"]))


def plainly(head: nn.Linear, leaves: dict[str, Tensor], targets: Tensor, loss: DepthLoss) -> Tensor:
    """The paper's loss with all logits at once, token by token and layer by layer."""
    weights = leaves["scores"].softmax(-1)
    logits = [head(state) for state in leaves["states"]]
    ensemble = sum(weights[:, i : i + 1] * one for i, one in enumerate(logits))
    total = F.cross_entropy(ensemble, targets, reduction="sum")
    for one in logits:
        total = total + loss.layer_loss * F.cross_entropy(one, targets, reduction="sum")
    if (distilled := loss.distillation) is not None:
        softened = [F.softmax(one, dim=-1) for one in logits]
        last = softened[-1].detach()
        for p in softened[:-1]:
            forward = (p * (p / last).log()).sum()
            backward = (last * (last / p).log()).sum()
            divergence = forward if distilled.direction == "layer-from-last" else backward
            total = total + distilled.weight * divergence
    return total


LOSSES = [
    DepthLoss(),
    DepthLoss(layer_loss=0.3),
    DepthLoss(DistillationSettings(weight=0.7)),
    DepthLoss(DistillationSettings(weight=0.7, direction="last-from-layer")),
    DepthLoss(DistillationSettings(weight=0.7), layer_loss=0.1),
    DepthLoss(DistillationSettings(weight=0.0)),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("at_once", [1, 4 * VOCABULARY, 10**9])
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradients_are_those_of_all_logits_at_once(
    loss: DepthLoss, at_once: int, bias: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(unembedding, "LOGITS_AT_ONCE", at_once)
    head, leaves, targets = parts(bias=bias)
    asked = [*leaves.values(), *head.parameters()]
    expected = plainly(head, leaves, targets, loss)
    wanted = torch.autograd.grad(expected, asked)
    found = loss(head, late(leaves), targets)
    gradients = torch.autograd.grad(3.0 * found, asked)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, 3.0 * other, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_takes_no_place():
    head, leaves, targets = parts()
    head.requires_grad_(False)
    DepthLoss(layer_loss=0.5)(head, late(leaves), targets).backward()
    assert head.weight.grad is None
    assert leaves["states"].grad.abs().min() > 0


def test_one_layer_is_not_distilled():
    head, leaves, targets = parts(k=1)
    found = DepthLoss(DistillationSettings(weight=5.0))(head, late(leaves), targets)
    assert found.item() == pytest.approx(
        F.cross_entropy(head(leaves["states"][0]), targets, reduction="sum").item()
    )


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_readers_are_the_ensemble_and_its_layers(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unembedding, "LOGITS_AT_ONCE", at_once)
    head, leaves, targets = parts()
    found = layer_losses(head, late(leaves), targets)
    for reader, state in zip(found, [late(leaves).mixed, *leaves["states"]], strict=True):
        each = [-math.log(F.softmax(head(s), -1)[t].item()) for s, t in zip(state, targets, strict=True)]
        assert reader.tolist() == pytest.approx(each, rel=1e-5)


def test_never_more_rows_at_once_than_allowed():
    seen = []

    def function(rows: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(rows))
        return (rows @ weight).square().sum()

    rows, weight = torch.randn(10, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    chunked_sum(function, [rows], [weight], 4).backward()
    assert seen == [4, 4, 2]
    expected = torch.autograd.grad((rows @ weight).square().sum(), [rows, weight])
    torch.testing.assert_close(rows.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


def test_autocast_keeps_one_copy_of_a_trained_head():
    """It keeps what it cast a leaf to: there must not be a leaf for every chunk."""
    seen = set()

    def function(rows: Tensor, weight: Tensor) -> Tensor:
        seen.add(id(weight))
        return F.linear(rows, weight).float().square().sum()

    rows, weight = torch.randn(10, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        chunked_sum(function, [rows], [weight], 2).backward()
    assert len(seen) == 1
