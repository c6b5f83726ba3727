"""The table of locations holds against a real model's hooks, and names what is not in it."""

import pytest
import torch

from probekit.models.locations import BEFORE, LABELS, OUTSIDE_BLOCKS, hook_name, per_layer


@pytest.fixture(scope="module")
def seen(tiny_run) -> dict[str, torch.Tensor]:
    """Activations of two tokens at every location of the table, in the last layer of a GPT-2."""
    last = tiny_run.frozen_lm().bridged.cfg.n_layers - 1
    names = {name: hook_name(name.removesuffix(BEFORE), last) for name in LABELS}
    with torch.no_grad():
        _, cache = tiny_run.frozen_lm().bridged.run_with_cache(
            torch.tensor([[3, 4]]), names_filter=list(names.values()), output_attentions=False
        )
    return {name: cache[hook][0].flatten(1) for name, hook in names.items()}


def test_each_is_a_hook_with_a_vector_for_each_position(seen: dict[str, torch.Tensor]):
    assert {name: len(values) for name, values in seen.items()} == dict.fromkeys(LABELS, 2)


def test_the_texts_say_what_is_there(seen: dict[str, torch.Tensor], tiny_run):
    """The sums that the drawing shows; what the unembedding reads is all that the logits are made of."""
    tokens = tiny_run.frozen_lm().bridged.original_model.get_input_embeddings().weight[[3, 4]]
    torch.testing.assert_close(seen["hook_embed"], tokens)
    middle = seen["hook_resid_pre"] + seen["hook_attn_out"]
    torch.testing.assert_close(seen["hook_resid_mid"], middle)
    torch.testing.assert_close(seen["hook_resid_post"], middle + seen["hook_mlp_out"])
    model = tiny_run.frozen_lm().bridged.original_model
    with torch.no_grad():
        logits = model(torch.tensor([[3, 4]])).logits[0]
    torch.testing.assert_close(model.get_output_embeddings()(seen["ln_final.hook_out"]), logits)


def test_locations_outside_the_blocks_are_there_once():
    assert {name for name in LABELS if not per_layer(name)} == {*OUTSIDE_BLOCKS}
    assert per_layer("mlp.hook_pre")
    assert per_layer("attn.hook_z" + BEFORE)
