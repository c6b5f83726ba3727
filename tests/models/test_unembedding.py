"""The unembedding: of the last layer the LM's own logits, of every other norm and head by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from probekit.errors import ProbekitError
from probekit.models.frozen_lm import FrozenLM
from probekit.models.language_model import load_model
from probekit.models.unembedding import find_unembedding

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def residuals(lm: FrozenLM) -> list[torch.Tensor]:
    """What leaves every layer, not normalised."""
    found: list[torch.Tensor] = [torch.empty(0)] * lm.layers

    def keep(layer: int):
        def read(activation: torch.Tensor) -> None:
            found[layer] = activation.clone()

        return read

    names = [f"blocks.{layer}.hook_resid_post" for layer in range(lm.layers)]
    with torch.no_grad():
        lm.backend_for(names)(TOKENS, [(name, keep(n)) for n, name in enumerate(names)], len(names))
    return found


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen3"])
def test_the_last_layer_has_the_logits_of_the_lm(family: str, base):
    lm = base(family)
    with torch.no_grad():
        found = find_unembedding(lm, lm.plain)(residuals(lm)[-1])
        torch.testing.assert_close(found, lm.plain(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_other_layers_go_through_the_final_norm_and_the_head(base):
    lm = base("gpt2")
    norm, head = lm.plain.transformer.ln_f, lm.plain.lm_head
    with torch.no_grad():
        for residual in residuals(lm):
            normed = F.layer_norm(residual, (16,), norm.weight, norm.bias, norm.eps)
            found = find_unembedding(lm, lm.plain)(residual)
            torch.testing.assert_close(found, normed @ head.weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Gemma2", {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.5}),
        ("Cohere", {"num_key_value_heads": 1, "logit_scale": 0.3}),
        ("Granite", {"num_key_value_heads": 1, "logits_scaling": 4.0}),
    ],
)
def test_logits_that_are_capped_or_scaled(
    name: str, settings: dict, make_model, tokenizer: PreTrainedTokenizerBase
):
    model = make_model(name, len(tokenizer), **settings).eval()
    lm = FrozenLM(lambda: model, model.config, tokenizer, name)
    with torch.no_grad():
        found = find_unembedding(lm, model)(residuals(lm)[-1])
        torch.testing.assert_close(found, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_without_a_final_norm_there_is_none(folders: dict, tokenizer: PreTrainedTokenizerBase):
    model = load_model(str(folders["gpt2"]))
    lm = FrozenLM(lambda: model, model.config, tokenizer, "gpt2")
    vars(lm)["architecture"] = replace(lm.architecture, modules={})
    with pytest.raises(ProbekitError, match=r"GPT2LMHeadModel has no final norm \(no ln_final\.hook_out\)"):
        find_unembedding(lm, model)
