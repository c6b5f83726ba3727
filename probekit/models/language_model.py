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
from probekit.data.special_tokens import separator_id
from probekit.errors import ProbekitError, one_line
from probekit.models.bidirectional import BRIDGED, auto_class, is_bidirectional, unread_positions
from probekit.models.pretrained import (
    OWN_CODE,
    check_memory,
    dtype_name,
    load_config,
    text_tower,
    why_not,
)
from probekit.progress import without_bars_of_transformers

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


SHALLOW_VOCABULARY = 64
"""Rows of a shallow LM's embedding; that of the LM itself may be its largest part."""


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
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Loads a causal or bidirectional LM from a local folder, a GGUF file or the hub.

    The towers of sentence encoders have no head; theirs has random weights, and nothing reads it.

    Args:
        name: The folder, the file, or the name on the hub.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Let the model's folder run its own code.
        device_map: How accelerate places the weights over GPUs, main memory and disk (its `device_map`).
            What is offloaded to disk lies in a temporary folder as long as the model is used. Unset: all are
            in main memory.
        dtype: Of the weights in memory.

    Raises:
        ProbekitError: There is no such folder or hub name, the hub is out of reach, some or all weights of
            the LM are not there, they do not fit into memory, or cannot be placed.
    """
    if device_map is not None and (processes := distributed.count()) > 1:
        raise ProbekitError(
            f"lm.device_map is {device_map!r}, but {processes} processes run, each with its own LM; use "
            "one process, or leave lm.device_map unset"
        )
    source = hub.find(name, setting="lm.name", revision=revision)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    if device_map is None:
        check_memory(name, config, dtype)
    offloaded = None if device_map is None else TemporaryDirectory(prefix="probekit-")
    try:
        with without_bars_of_transformers():
            model, report = auto_class(config).from_pretrained(
                source.name,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                device_map=device_map,
                offload_folder=None if offloaded is None else offloaded.name,
                **({} if source.file else {"use_safetensors": True}),
                **text_tower(source, config),
                **source.arguments,
            )
    except Exception as error:
        placing = "" if device_map is None else f" with lm.device_map {device_map!r}"
        raise ProbekitError(
            f"lm.name {name!r}: no LM could be loaded from it{placing}; {why_not(source, error)}"
        ) from error
    tower = f"{model.base_model_prefix}." if is_bidirectional(config) else ""
    if missing := sorted(key for key in report["missing_keys"] if key.startswith(tower)):
        raise ProbekitError(
            f"lm.name {name!r}: its weights lack {missing[0]} and {len(missing) - 1} more that "
            f"{type(model).__name__} needs; give a folder or name with all weights of an LM"
        )
    if source.file:  # its weights are plain numbers now, which Transformers would refuse to save
        model.hf_quantizer.remove_quantization_config(model)
    if offloaded is not None:
        placed = getattr(model, "hf_device_map", {"": str(model.device)})
        if len({*placed.values()}) == 1:  # Transformers leaves out the hooks that move tokens to the device
            model = _place(model, placed)
        else:
            model.offload_folder = offloaded  # removed with the model
    return model


def _place(model: PreTrainedModel, device_map: dict[str, Any]) -> PreTrainedModel:
    from accelerate import dispatch_model

    model.offload_folder = TemporaryDirectory(prefix="probekit-")
    return dispatch_model(model, device_map, offload_dir=model.offload_folder.name, force_hooks=True)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model in Hugging Face format, with weights that whoever reads its config may read."""
    weights: dict[int, tuple[str, torch.Tensor]] = {}  # tied ones under the first of their names
    for name, tensor in model.state_dict(keep_vars=True).items():
        weights.setdefault(id(tensor), (name, tensor.detach()))
    with without_bars_of_transformers():
        model.save_pretrained(folder, state_dict=dict(weights.values()))
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):  # which safetensors lets only their owner read
        path.chmod(mode)


def is_placed(model: PreTrainedModel) -> bool:
    """Whether accelerate placed the model's weights (`lm.device_map`)."""
    return getattr(model, "hf_device_map", None) is not None


def main_device(model: PreTrainedModel) -> torch.device:
    """Where the model takes tokens; of one that accelerate placed, its first GPU if there is one."""
    if not is_placed(model):
        return model.device
    devices = [device for device in model.hf_device_map.values() if device not in ("cpu", "disk")]
    return torch.device(devices[0] if devices else "cpu")


def random_weights(
    config: PreTrainedConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device_map: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A model of the same architecture with random weights; the same seed gives the same weights.

    Args:
        config: The LM's.
        seed: Seed of the weights.
        dtype: Of the weights.
        device_map: Where accelerate is to place them, module by module; unset: in main memory.
    """
    with torch.random.fork_rng():
        # Not the seed itself: an untrained model of that seed would come out again. Of more than 32 bits, the
        # generator of a CPU takes the lowest 32.
        torch.manual_seed(seed ^ 2**31)
        # The class of a configuration comes from the checkpoint's own code only where that is trusted.
        trusted = type(config).__module__.startswith(OWN_CODE)
        model = auto_class(config).from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=trusted)
    return model if device_map is None else _place(model, device_map)


def layers_like(config: PreTrainedConfig) -> tuple[int, ...]:
    """For every layer the first one that its configuration makes of the same kind `[layers]`.

    Two layers are of one kind if all that is listed layer by layer, such as the kind of attention, is equal.
    """
    text = config.get_text_config()
    depth = text.num_hidden_layers
    listed = [value for value in vars(text).values() if isinstance(value, list) and len(value) == depth]
    kinds = [*zip(*listed, strict=True)] or [()] * depth
    dense = getattr(text, "first_k_dense_replace", 0) or 0  # of a mixture of experts, these layers have none
    kinds = [(*kind, layer < dense) for layer, kind in enumerate(kinds)]
    return tuple(kinds.index(kind) for kind in kinds)


def shallow(config: PreTrainedConfig) -> PreTrainedModel:
    """A small LM of the same architecture, in float32: the first layers, with one of every kind.

    All of its weights are random, also those that begin as zeros and ones, so that none can be left out
    unnoticed.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    layers = min(depth, max(2, 1 + max(layers_like(config))))
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    text.vocab_size = min(text.vocab_size, SHALLOW_VOCABULARY)
    if (getattr(text, "pad_token_id", None) or 0) >= text.vocab_size:
        text.pad_token_id = 0
    model = random_weights(config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def shown_error(error: Exception) -> str:
    """What another library raised, on one line that is not long."""
    line = one_line(error) or type(error).__name__
    return line if len(line) <= 200 else f"{line[:199]}…"


def longest_window(config: PreTrainedConfig) -> int:
    """Tokens that the LM can read at once; without bound where it has no table of positions.

    The token at the end of what a bidirectional LM reads is not counted.
    """
    positions = int(getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize))
    return positions - unread_positions(config)


def bridge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | Path) -> TransformerBridge:
    """Bridges an LM to TransformerLens: frozen, in evaluation mode, with Hugging Face numerics.

    Args:
        model: Rewired in place: keep no other use of it.
        tokenizer: Passed on so that the hub is not asked for one.
        name: What the model is called in messages.

    Raises:
        ProbekitError: TransformerLens has no bridge for this architecture.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ProbekitError(
            f"lm.name {str(name)!r}: TransformerLens cannot run LoRA's updates beside weights of "
            f"{dtype_name(model.dtype)}; give lm.dtype float32, or other locations"
        )
    model.config.architectures = model.config.architectures or [type(model).__name__]
    if is_bidirectional(model.config):
        model.config.architectures = [BRIDGED[model.config.model_type]]
        tokenizer = copy.deepcopy(tokenizer)  # TransformerLens would give it a token that begins texts
    try:
        bridged = TransformerBridge.boot_transformers(
            str(name), hf_model=model, tokenizer=tokenizer, device=model.device, dtype=model.dtype
        )
    except Exception as error:  # each architecture has an adapter of its own there, which may raise anything
        raise ProbekitError(
            f"lm.name {str(name)!r}: TransformerLens cannot bridge {model.config.architectures[0]} "
            f"({shown_error(error)})"
        ) from error
    bridged.eval()
    bridged.original_model.requires_grad_(False)
    return bridged
