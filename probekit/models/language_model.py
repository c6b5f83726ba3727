"""The base LM: built new or loaded, and bridged to TransformerLens.

Training a new LM uses the plain Hugging Face module with its fast attention kernel; bridging rewires a module in
place, so what is saved is always the plain one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from probekit import hub
from probekit.config import LanguageModelSettings
from probekit.corpus.tokenizer import separator_id
from probekit.errors import ProbekitError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def load_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads a causal LM in float32 from a local folder or the hub.

    Raises:
        ProbekitError: There is no such folder or hub name, the hub is out of reach, or the folder has no weights
            of a causal LM.
    """
    from transformers import AutoModelForCausalLM

    source = hub.find(name, setting="lm.name", revision=revision)
    try:
        return AutoModelForCausalLM.from_pretrained(
            source.name, dtype=torch.float32, trust_remote_code=trust_remote_code, **source.arguments
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ProbekitError(
            f"lm.name {name!r}: no causal LM could be loaded from it; it needs a config.json and model.safetensors "
            f"({reason})"
        ) from error


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
            f"lm.name {str(name)!r}: TransformerLens cannot bridge {architectures} ({error})"
        ) from error
    bridged.eval()
    bridged.original_model.requires_grad_(False)
    return bridged


def longest_window(model: PreTrainedModel) -> int:
    """Positions that the LM can read at once, in tokens."""
    return int(model.config.get_text_config().max_position_embeddings)


def hook_name(location: str, layer: int) -> str:
    """The full TransformerLens hook name of a location at a layer."""
    return f"blocks.{layer}.{location}"


def locations(bridged: TransformerBridge) -> list[str]:
    """Every location (hook name without its layer) that this architecture's first block has, sorted."""
    prefix = hook_name("", 0)
    return sorted(name.removeprefix(prefix) for name in bridged.hook_dict if name.startswith(prefix))


def check_location(bridged: TransformerBridge, location: str, setting: str) -> None:
    """Refuses a location that this architecture lacks.

    Raises:
        ProbekitError: Names the setting, and lists the locations that there are.
    """
    if bridged.get_hook_point(hook_name(location, 0)) is None:
        raise ProbekitError(
            f"{setting} is {location!r}, which this architecture lacks; it has {', '.join(locations(bridged))}"
        )
