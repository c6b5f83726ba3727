"""The base LM: built new or loaded, and bridged to TransformerLens.

Training a new LM uses the plain Hugging Face module with its fast attention kernel; bridging rewires a module
in place, so what is saved is always the plain one.
"""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probekit.config import LanguageModelSettings
from probekit.data import hub
from probekit.data.tokenizer import separator_id
from probekit.errors import ProbekitError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def new_model(
    settings: LanguageModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A GPT-2 with random weights, of the size the settings give; the same seed gives the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    separator = separator_id(tokenizer)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.positions,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        bos_token_id=separator,
        eos_token_id=separator,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def random_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same architecture with random weights; the same seed gives the same weights."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        # Not the seed itself: an untrained model of that seed would come out again.
        torch.manual_seed(seed + 2**40)
        return AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)


def without_weights(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal LM whose weights have shapes alone (PyTorch's meta device)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )


def allocated(outline: PreTrainedModel) -> PreTrainedModel:
    """Gives an LM without weights any, in memory that is taken only where it is written to."""
    outline.to_empty(device="cpu")
    outline.tie_weights()
    return outline


def shallow(config: PreTrainedConfig) -> PreTrainedModel:
    """A stand-in for an LM: random weights, and its first layers alone, with one of every kind."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth, kinds = text.num_hidden_layers, getattr(text, "layer_types", None) or [None]
    layers = min(depth, max(2, 1 + max(kinds.index(kind) for kind in kinds)))
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return random_weights(without_weights(config), 0)


def load_outline(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """What `load_model` gives, without weights.

    Raises:
        ProbekitError: There is no such folder or hub name, the hub is out of reach, or it has no config.json.
    """
    from transformers import AutoConfig

    source = hub.find(name, setting="lm.name", revision=revision)
    try:
        config = AutoConfig.from_pretrained(
            source.name, trust_remote_code=trust_remote_code, **source.arguments
        )
        return without_weights(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ProbekitError(
            f"lm.name {name!r}: its config.json describes no causal LM ({_reason(error)})"
        ) from error


def load_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads a causal LM in float32 from a local folder or the hub.

    Raises:
        ProbekitError: There is no such folder or hub name, the hub is out of reach, some or all weights of a
            causal LM are not there, or what is there is no causal LM.
    """
    from transformers import AutoModelForCausalLM

    source = hub.find(name, setting="lm.name", revision=revision)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.name,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **source.arguments,
        )
    except Exception as error:
        raise ProbekitError(
            f"lm.name {name!r}: no causal LM could be loaded from it; it needs a config.json and "
            f"model.safetensors ({_reason(error)})"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ProbekitError(
            f"lm.name {name!r}: its weights lack {missing[0]} and {len(missing) - 1} more that "
            f"{type(model).__name__} needs; give a folder or name with all weights of a causal LM"
        )
    if _reads_ahead(model):
        raise ProbekitError(
            f"lm.name {name!r}: {type(model).__name__} reads the tokens that it should predict; "
            "give a causal LM"
        )
    return model


def bridge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | Path) -> TransformerBridge:
    """Bridges a causal LM to TransformerLens: frozen, in evaluation mode, with Hugging Face numerics.

    Args:
        model: Rewired in place: keep no other use of it.
        tokenizer: Passed on so that the hub is not asked for one.
        name: What the model is called in messages.

    Raises:
        ProbekitError: TransformerLens has no bridge for this architecture.
    """
    from transformer_lens.model_bridge import TransformerBridge

    try:
        bridged = TransformerBridge.boot_transformers(
            str(name), hf_model=model, tokenizer=tokenizer, device=model.device
        )
    except (ValueError, NotImplementedError, KeyError, AttributeError) as error:
        architectures = ", ".join(model.config.architectures or [type(model).__name__])
        raise ProbekitError(
            f"lm.name {str(name)!r}: TransformerLens cannot bridge {architectures} ({_reason(error)})"
        ) from error
    bridged.eval()
    bridged.original_model.requires_grad_(False)
    return bridged


def bridge_without_weights(
    outline: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | Path
) -> TransformerBridge:
    """Bridges an LM that has no weights, so that hooks and their shapes can be looked up.

    Raises:
        ProbekitError: TransformerLens has no bridge for this architecture.
    """
    try:
        return bridge(outline, tokenizer, name)
    except ProbekitError:  # queries, keys and values that are one matrix are taken apart by their values
        bridged = bridge(allocated(without_weights(outline.config)), tokenizer, name)
        bridged.original_model.to("meta")
        return bridged


def shallow_bridge(bridged: TransformerBridge) -> TransformerBridge:
    """A shallow stand-in for a bridged LM, with weights."""
    like = shallow(bridged.original_model.config)
    return bridge(like, bridged.tokenizer, "a shallow LM of the same architecture")


def longest_window(model: PreTrainedModel) -> int:
    """Positions that the LM can read at once, in tokens; without bound where it has no table of positions."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize))


Hook = tuple[str, Callable[..., Tensor | None]]
"""A full TransformerLens hook name, and what is called with the activation there; it may return another."""

OUTSIDE_BLOCKS = ("hook_embed", "ln_final.hook_out")
"""Locations that a model has once: before its first block, and behind its last."""


def hook_name(location: str, layer: int) -> str:
    """The full TransformerLens hook name of a location at a layer."""
    return location if location in OUTSIDE_BLOCKS else f"blocks.{layer}.{location}"


def layer_of(name: str) -> int | None:
    """The last layer that has to be run for a hook to fire; None where all of the model has to."""
    if name == OUTSIDE_BLOCKS[0]:
        return 0
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else None


def locations(bridged: TransformerBridge) -> dict[str, int]:
    """Every location that holds a vector for each position, and the vector's features.

    Some hooks never fire, some hold attention patterns, some have the heads before the positions. Where there
    is a vector for each position, one more token makes the second axis longer and changes no other. Blocks
    are taken to be like the first.
    """
    if bridged.original_model.device.type == "meta":  # not all LMs can be run without weights
        bridged = shallow_bridge(bridged)
    short, long = (_shapes(bridged, length) for length in (1, 2))
    return {
        location: math.prod(shape[2:])
        for location, shape in sorted(short.items())
        if (*shape[:2], *long[location]) == (1, 1, 1, 2, *shape[2:])
    }


def check_location(known: dict[str, int], location: str, setting: str) -> None:
    """Refuses a location that this architecture lacks, or that does not hold a vector for each position.

    Raises:
        ProbekitError: Names the setting, and lists the locations that there are.
    """
    if location not in known:
        raise ProbekitError(
            f"{setting} is {location!r}, where this architecture holds no vector for each position; it "
            f"does at {', '.join(known)}"
        )


def _shapes(bridged: TransformerBridge, length: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all that fires in the first block, and around the blocks, over a text of some tokens."""
    prefix = hook_name("", 0)
    tokens = torch.zeros(1, length, dtype=torch.long, device=bridged.original_model.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gated-off hook")
        _, cache = bridged.run_with_cache(
            tokens,
            names_filter=lambda name: name.startswith(prefix) or name in OUTSIDE_BLOCKS,
            output_attentions=False,
        )
    return {
        name.removeprefix(prefix): tuple(value.shape) for name, value in cache.items() if value is not None
    }


def _reads_ahead(model: PreTrainedModel) -> bool:
    """Whether the next token changes a position's logits, as in a BERT, which loads as a causal LM too."""
    with torch.no_grad():
        one, other = model(torch.tensor([[0, 0], [0, 1]])).logits[:, 0]
    return bool((one - other).abs().max() > 1e-4 * one.abs().max())


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
