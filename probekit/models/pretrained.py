"""What a pre-trained LM is, before its weights are loaded: config, dtype, size, or why it is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from probekit.data import hub
from probekit.data.special_tokens import separator_id
from probekit.errors import ProbekitError, one_line
from probekit.io import read_json
from probekit.models.bidirectional import BRIDGED, auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The kinds of `lm.dtype` beside auto."""

HALF = (torch.bfloat16, torch.float16)

BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""What torch calls the units of CPUs that compute in bfloat16."""

ADAPTER = "adapter_config.json"
"""The file of a folder that holds an adapter of peft."""

GROUPS, PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self")
"""Where Linux shows limits on groups of processes, and this process's groups."""

OWN_CODE = "transformers_modules."
"""Begins the module of a configuration that comes with its checkpoint, whose code is trusted."""

OVERHEAD = 0.05
"""Memory that loading takes beside the weights, as a share of them."""


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The configuration of an LM, or of the text tower of a multimodal one.

    Raises:
        ProbekitError: There is none, it is of no LM that is read, or its weights are quantised, not in GGUF.
    """
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    source = hub.find(name, setting="lm.name", revision=revision)
    if source.file and find_spec("gguf") is None:
        raise ProbekitError(
            f"lm.name {name!r} is a GGUF file, and the package gguf is not installed; pip install gguf"
        )
    try:
        config = AutoConfig.from_pretrained(
            source.name, trust_remote_code=trust_remote_code, **source.arguments
        )
    except Exception as error:
        raise ProbekitError(
            f"lm.name {name!r}: no LM could be loaded from it; {why_not(source, error)}"
        ) from error
    if source.path.is_dir() and (source.path / ADAPTER).is_file():
        # Transformers would load the LM that the adapter names, whatever else the folder holds.
        raise ProbekitError(f"lm.name {name!r}: {_adapter(source.path)}")
    for key, value, kind, wanted in (
        ("architectures", config.architectures or [], list, "a list"),
        ("dtype", config.dtype or torch.float32, torch.dtype, "the name of a dtype"),
        ("text_config", config.get_text_config(), PreTrainedConfig, "a configuration"),
    ):
        if not isinstance(value, kind):
            raise ProbekitError(
                f"lm.name {name!r}: its config.json has {value!r} as {key}, where {wanted} should be"
            )
    if quantised := getattr(config, "quantization_config", None):
        _check_quantisation(source, quantised if isinstance(quantised, Mapping) else quantised.to_dict())
    architecture = (config.architectures or [type(config).__name__])[0]
    text = config.get_text_config()
    if text is not config:
        if text.model_type not in CAUSAL:
            raise ProbekitError(
                f"lm.name {name!r}: Transformers has no causal LM for the text tower ({text.model_type}) of "
                f"{architecture}, which is multimodal; give an LM that reads text alone"
            )
        text.dtype, text.architectures = text.dtype or config.dtype, None
        config = text
    if config.model_type not in {*CAUSAL, *BRIDGED} and not hasattr(config, "auto_map"):
        raise ProbekitError(
            f"lm.name {name!r}: {architecture} is no causal LM, and of others only {', '.join(BRIDGED)} are "
            "read"
        )
    return config


def text_tower(source: hub.Source, config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the LM of `load_config`, which may be one of several towers."""
    from transformers import PreTrainedConfig

    if PreTrainedConfig.get_config_dict(source.name, **source.arguments)[0].get("model_type") in (
        None,
        config.model_type,
    ):
        return {}
    towers = {
        r"^(model\.)?language_model\.model\.": "model.",
        r"^(model\.)?language_model\.lm_head": "lm_head",
        r"^(model\.)?language_model\.": "model.",
    }
    return {"config": copy.deepcopy(config), "key_mapping": towers}


def _check_quantisation(source: hub.Source, quantised: Mapping[str, Any]) -> None:
    """Refuses quantised weights but for those of GGUF files, which are read as numbers of `lm.dtype`."""
    method = str(getattr(quantised.get("quant_method"), "value", quantised.get("quant_method")))
    if method == "gguf":
        return
    bits = quantised.get("bits") or next((n for n in (4, 8) if quantised.get(f"load_in_{n}bit")), None)
    kind = f"{method}{f', {bits} bits' if bits else ''}"
    if _plain_weights(source.path):
        raise ProbekitError(
            f"lm.name {source.name!r}: its config.json asks for quantisation ({kind}), but its weights are "
            "plain; remove quantization_config from config.json to read them as they are"
        )
    raise ProbekitError(
        f"lm.name {source.name!r}: its weights are quantised ({kind}), and only those of GGUF files are "
        "read; give the checkpoint that they were made from, or a GGUF file"
    )


def _plain_weights(folder: Path) -> bool:
    """Whether a folder's weights are all floating-point numbers, none of which is a scale of others."""
    kinds = {
        "" if name.endswith(("scale", "scale_inv", "absmax")) else weights.get_slice(name).get_dtype()
        for path in folder.glob("*.safetensors")
        for weights in [safe_open(path, "pt")]
        for name in weights.keys()  # noqa: SIM118 - it is no mapping
    }
    return bool(kinds) and kinds <= {"F64", "F32", "F16", "BF16"}


def why_not(source: hub.Source, error: Exception) -> str:
    """Why nothing could be loaded from a source: what its folder holds, or what was raised."""
    if source.file:
        return f"the file cannot be read ({one_line(error)[:200]})"
    if Path(source.name).is_dir():
        return contents(Path(source.name)) or _damaged(Path(source.name)) or one_line(error)[:200]
    return f"it needs a config.json and model.safetensors ({one_line(error)[:200]})"


def contents(folder: Path) -> str | None:
    """What a folder holds from which no LM can be loaded, and what to do; None where nothing is amiss."""
    if not folder.is_dir():
        return None
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    whole, gguf, pickles = ([n for n in names if n.endswith(e)] for e in (".safetensors", ".gguf", ".bin"))
    if gguf:
        return f"it holds {', '.join(gguf[:3])}: give the path of a GGUF file itself"
    if ADAPTER in names:
        return _adapter(folder)
    if pickles and not whole:
        return (
            f"its weights are a pickle ({pickles[0]}), which could run code when it is read; save them as "
            "model.safetensors with save_pretrained of Transformers"
        )
    there = {"config.json": "config.json" in names, "model.safetensors": bool(whole)}
    if all(there.values()):
        return None
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"it lacks {' and '.join(n for n in there if not there[n])}, and holds {shown or 'no file'}"


def _damaged(folder: Path) -> str | None:
    """Which file of weights in a folder is not whole, and why; None where all are."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"its {path.name} is not whole ({one_line(error)[:200]}); get the file again"
    return None


def _adapter(folder: Path) -> str:
    """What to do with a folder that holds an adapter."""
    known = read_json(folder / ADAPTER)
    base = (known.get("base_model_name_or_path") if isinstance(known, dict) else None) or "its LM"
    return (
        f"it holds a peft adapter, which is no LM: load {base} with it, and save what its merge_and_unload "
        "returns"
    )


def dtype_of(setting: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype in which an LM's weights are held.

    The checkpoint's own where nothing else is asked for. On a CPU weights of half precision are held in
    bfloat16 if it has units for that, or else in float32, which is faster there.

    Args:
        setting: `lm.dtype`.
        config: The LM's.
        device: Where it is to run.

    Raises:
        ProbekitError: The device does not compute in the dtype that is asked for.
    """
    if setting != "auto":
        if not _computes_in(DTYPES[setting], device):
            raise ProbekitError(
                f"lm.dtype is {setting!r}, in which {device} does not compute; give auto or float32"
            )
        return DTYPES[setting]
    own = _own_dtype(config)
    if getattr(config, "quantization_config", None):  # of a GGUF file, whose weights have fewer bits
        own = torch.bfloat16
    if own not in HALF:
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    return own if _computes_in(own, device) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """What `lm.dtype` calls a dtype."""
    return str(dtype).removeprefix("torch.")


def _own_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of a checkpoint's weights."""
    own = getattr(config, "dtype", None) or torch.float32
    return own if isinstance(own, torch.dtype) else getattr(torch, own)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has units that compute in bfloat16."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11
    return any(known.get(unit) for unit in BFLOAT16_UNITS)


def _computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type == "cuda" and dtype is torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        one = torch.ones(2, 2, dtype=dtype, device=device)
        torch.nn.functional.layer_norm(one @ one, (2,)).softmax(dim=-1).sum().item()
    except (RuntimeError, TypeError):
        return False
    return True


def check_memory(name: str, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Refuses an LM whose weights are larger than the memory that is free, before any is had or loaded.

    Raises:
        ProbekitError: It gives both sizes, and the ways out.
    """
    import psutil

    try:
        needed = count_weights(config) * dtype.itemsize * (1 + OVERHEAD)
    except Exception:  # noqa: BLE001 - of a class's own code; who makes the LM says why none can be made
        return
    free = min([psutil.virtual_memory().available, *_left_to_group()])
    if needed > free:
        smaller = "lm.dtype bfloat16, " if dtype not in HALF and needed / 2 <= free else ""
        raise ProbekitError(
            f"lm.name {name!r}: its weights take {needed / 1e9:.1f} GB in "
            f"{dtype_name(dtype)}, and {free / 1e9:.1f} GB of memory are free; give {smaller}"
            "lm.device_map auto (GPUs, memory and disk), or a smaller LM"
        )


def count_weights(config: PreTrainedConfig) -> int:
    """The number of an LM's weights, of which none is made."""
    trusted = type(config).__module__.startswith(OWN_CODE)
    with torch.device("meta"):
        model = auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=trusted)
    return sum(parameter.numel() for parameter in model.parameters())


def _left_to_group() -> Iterator[int]:
    """Bytes of memory that are left to this process by each limit on its group, as containers set them."""
    try:
        groups = dict(line.split(":", 2)[1:] for line in (PROCESS / "cgroup").read_text().split())
    except (OSError, ValueError):
        return
    own = [(GROUPS, groups.get("", ""), "memory.max", "memory.current", "inactive_file")]
    if "memory" in groups:
        limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        own.append((GROUPS / "memory", groups["memory"], limit, used, "total_inactive_file"))
    for root, path, limit, used, cache in own:
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            try:
                most, taken = (int((group / name).read_text()) for name in (limit, used))
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (
                OSError,
                ValueError,
            ):  # no limit, or a container that shows its group as the root
                continue
            yield max(0, most - taken + int(counts.get(cache, 0)))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    """Refuses a tokenizer that gives tokens for which the LM has no embedding.

    Special tokens beyond the embedding, such as those for pictures of a text tower, are none of a text.

    Raises:
        ProbekitError: It names the token.
    """
    rows = config.get_text_config().vocab_size
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    beyond = {text: token for text, token in tokenizer.get_vocab().items() if token >= rows}
    if ordinary := sorted(beyond.keys() - special, key=beyond.__getitem__):
        raise ProbekitError(
            f"lm.name {name!r}: its tokenizer has {ordinary[0]!r} with id {beyond[ordinary[0]]}, but its "
            f"embedding has {rows} rows; give the tokenizer that the LM was trained with"
        )
    if (separator := separator_id(tokenizer)) >= rows:
        raise ProbekitError(
            f"lm.name {name!r}: the token that begins its texts has id {separator}, but its embedding has "
            f"{rows} rows; give the tokenizer that the LM was trained with"
        )


def check_weights(model: PreTrainedModel, name: str) -> None:
    """Refuses weights that are not finite, of which all that is computed would be no number.

    Raises:
        ProbekitError: It names the first of them.
    """
    for parameter, weights in model.named_parameters():
        if weights.device.type == "meta":
            continue
        # A sum is finite if all is, unless it overflows, and takes no memory.
        if not weights.detach().sum().isfinite() and not weights.detach().isfinite().all():
            reason = (
                "too large for float16; give lm.dtype bfloat16"
                if weights.dtype is torch.float16
                else "damaged; get it again, or give an earlier checkpoint"
            )
            raise ProbekitError(
                f"lm.name {name!r}: its weights {parameter} are not all finite in "
                f"{dtype_name(weights.dtype)}: they are {reason}"
            )


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Where a model lists its layers, and the layers; None if it does not list them in one place."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = ((path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return next(((path, layers) for path, layers in lists if len(layers) == depth), None)
