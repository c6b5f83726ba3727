"""The base LM as a Hugging Face module: new, loaded, placed over devices, or bridged to TransformerLens."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from probekit import distributed
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


def load_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, str | int] | None = None,
) -> PreTrainedModel:
    """Loads a causal LM in float32 from a local folder or the hub.

    Args:
        name: The folder, or the name on the hub.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Let the model's folder run its own code.
        device_map: How accelerate places the weights over GPUs, main memory and disk (its `device_map`).
            What is offloaded to disk lies in a temporary folder as long as the model is used. Unset: all are
            in main memory.

    Raises:
        ProbekitError: There is no such folder or hub name, the hub is out of reach, some or all weights of a
            causal LM are not there, what is there is no causal LM, or it cannot be placed.
    """
    from transformers import AutoModelForCausalLM

    if device_map is not None and (processes := distributed.count()) > 1:
        raise ProbekitError(
            f"lm.device_map is {device_map!r}, but {processes} processes run, each with its own LM; use "
            "one process, or leave lm.device_map unset"
        )
    source = hub.find(name, setting="lm.name", revision=revision)
    offloaded = None if device_map is None else TemporaryDirectory(prefix="probekit-")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.name,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            device_map=device_map,
            offload_folder=None if offloaded is None else offloaded.name,
            **source.arguments,
        )
    except Exception as error:
        placing = "" if device_map is None else f" with lm.device_map {device_map!r}"
        raise ProbekitError(
            f"lm.name {name!r}: no causal LM could be loaded from it{placing}; it needs a config.json and "
            f"model.safetensors ({_reason(error)})"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ProbekitError(
            f"lm.name {name!r}: its weights lack {missing[0]} and {len(missing) - 1} more that "
            f"{type(model).__name__} needs; give a folder or name with all weights of a causal LM"
        )
    if offloaded is not None:
        found = getattr(model, "hf_device_map", {"": str(model.device)})
        if len({*found.values()}) == 1:  # Transformers leaves out the hooks that move tokens to the device
            _place(model, found)
        model.offload_folder = offloaded  # removed with the model
    if _reads_ahead(model):
        raise ProbekitError(
            f"lm.name {name!r}: {type(model).__name__} reads the tokens that it should predict; "
            "give a causal LM"
        )
    return model


def _place(model: PreTrainedModel, device_map: dict[str, Any]) -> PreTrainedModel:
    from accelerate import dispatch_model

    model.offload_folder = TemporaryDirectory(prefix="probekit-")
    return dispatch_model(model, device_map, offload_dir=model.offload_folder.name, force_hooks=True)


def _reads_ahead(model: PreTrainedModel) -> bool:
    """Whether the next token changes a position's logits, as in a BERT, which loads as a causal LM too."""
    with torch.no_grad():
        one, other = model(torch.tensor([[0, 0], [0, 1]], device=main_device(model))).logits[:, 0]
    return bool((one - other).abs().max() > 1e-4 * one.abs().max())


def is_placed(model: PreTrainedModel) -> bool:
    """Whether accelerate placed the model's weights (`lm.device_map`)."""
    return getattr(model, "hf_device_map", None) is not None


def main_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes tokens; of one that accelerate placed, its first GPU if there is one."""
    if not is_placed(model):
        return model.device
    devices = [device for device in model.hf_device_map.values() if device not in ("cpu", "disk")]
    return torch.device(devices[0] if devices else "cpu")


def random_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same architecture with random weights, placed as the model is.

    The same seed gives the same weights.
    """
    made = _random(model.config, seed)
    return _place(made, model.hf_device_map) if is_placed(model) else made


def shallow(config: PreTrainedConfig) -> PreTrainedModel:
    """A small LM of the same architecture with random weights: the first layers, with one of every kind."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth, kinds = text.num_hidden_layers, getattr(text, "layer_types", None) or [None]
    layers = min(depth, max(2, 1 + max(kinds.index(kind) for kind in kinds)))
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return _random(config, 0)


def _random(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        # Not the seed itself: an untrained model of that seed would come out again.
        torch.manual_seed(seed + 2**40)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def longest_window(config: PreTrainedConfig) -> int:
    """Positions that the LM can read at once, in tokens; without bound where it has no table of positions."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize))


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


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
