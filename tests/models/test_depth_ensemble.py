"""The depth ensemble against sums of logits written out, for every family."""

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from probekit.config import DepthSettings, MemberName
from probekit.data.windows import collate, cut_windows
from probekit.errors import ProbekitError
from probekit.models.base_lm import BaseLM
from probekit.models.decoding import Decoder, GrowingText, HFDecoder, new_decoder
from probekit.models.depth_ensemble import DepthEnsemble, final_norm, new_ensemble
from probekit.models.hook_points import BridgeBackend
from probekit.models.language_model import bridge
from probekit.models.mixing import Fixed
from probekit.models.planner_lm import PlannedLM

FAMILIES = ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen2", "qwen3"]
DEPTH = 3


@pytest.fixture(scope="module")
def batch(make_corpus):
    corpus = make_corpus([[3, 2, 4], [1, 1, 5, 2]])
    return collate(corpus, cut_windows(corpus, torch.arange(2).numpy(), 32, 32))


def ensemble_on(lm: BaseLM, member: MemberName = "ensemble", **settings: object) -> DepthEnsemble:
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


def naive(lm: BaseLM, ensemble: DepthEnsemble, tokens: Tensor, top_k: int | None) -> Tensor:
    """All layers' logits, weighted one by one, as the paper writes it."""
    norm = final_norm(lm.bridged, lm.plain)
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
    backend = lm.forward_pass(ensemble.names) if fast else BridgeBackend(lm.bridged)
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
        for backend in (BridgeBackend(lm.bridged), lm.forward_pass(ensemble.names)):
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
    norm, head = final_norm(lm.bridged, lm.plain), lm.plain.get_output_embeddings()
    with torch.no_grad():
        state = norm(hidden_states(lm.plain, batch.tokens)[-1])
        weights = torch.softmax(state @ ensemble.router.weight.T + ensemble.router.bias, dim=-1)
        expected = sum(
            weights[..., i : i + 1] * head(state * ensemble.scale[i] + ensemble.shift[i]) for i in range(3)
        )
        model = PlannedLM(BridgeBackend(lm.bridged), None, None, 1.0, depth=ensemble)
        torch.testing.assert_close(model(batch, Fixed()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last_weight", [0.2, 0.9])
def test_the_router_begins_about_where_it_is_told_to(last_weight: float, base, batch):
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
    fast = new_decoder(model, lm.forward_pass(model.names), 8)
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


def test_a_model_without_a_final_norm(tokenizer: PreTrainedTokenizerBase):
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2,
        num_attention_heads=2, ffn_dim=24, max_position_embeddings=32, do_layer_norm_before=False,
        architectures=["OPTForCausalLM"],
    )  # fmt: skip
    lm = BaseLM(lambda: OPTForCausalLM(config).eval(), tokenizer, "facebook/opt-125m")
    with pytest.raises(ProbekitError, match=r"no final norm.*--method planner"):
        ensemble_on(lm, layers=1)


def test_a_model_that_caps_its_logits(make_model, tokenizer: PreTrainedTokenizerBase):
    settings = {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.5}
    lm = BaseLM(lambda: make_model("Gemma2", len(tokenizer), **settings).eval(), tokenizer, "gemma")
    with pytest.raises(ProbekitError, match="caps or scales"):
        ensemble_on(lm, layers=1)


def test_the_bridge_is_left_as_it_was(base, batch):
    lm = base("gpt_neox")
    before = lm.bridged(batch.tokens)
    model = PlannedLM(BridgeBackend(lm.bridged), None, None, 1.0, depth=scrambled(ensemble_on(lm)))
    assert not torch.allclose(model(batch, Fixed()), before)
    torch.testing.assert_close(lm.bridged(batch.tokens), before)
    assert bridge(lm._load(), lm._tokenizer, "again") is not lm.bridged
