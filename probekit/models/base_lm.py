"""The base LM, plain and bridged, and what training makes of it: frozen, LoRA, or all weights.

Training and reading use the plain Hugging Face module where its hooks allow; a tuned one is saved, loaded and
bridged like any other LM. Tuning through the bridge would train its own copies of some weights, such as those
of a fused attention, which nobody could save.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from probekit.config import BaseSettings
from probekit.errors import ProbekitError
from probekit.io import atomic_folder, read_tensors, write_tensors
from probekit.models.hook_points import (
    Backend,
    BridgeBackend,
    HFBackend,
    find_hook_point,
    forward_pass,
    layer_of,
    locations,
)
from probekit.models.language_model import bridge, is_placed, shallow
from probekit.progress import without_bars_of_transformers

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


LORA_SCALE = 2.0
"""LoRA's alpha / rank."""

LORA_WEIGHTS = "adapter_model.safetensors"
"""The file of low-rank updates, as peft calls it."""


class BaseLM:
    """A frozen causal LM, plain and bridged, each loaded when it is first asked for.

    Bridging rewires a module in place, so each has weights of its own. An LM that accelerate placed is never
    bridged: hooks are looked up on a shallow LM of the same architecture.

    Args:
        load: Makes a fresh plain one, on its device or placed by accelerate.
        tokenizer: The LM's.
        name: What it is called in messages.
        like: An LM of the same architecture, on which hooks have been looked up already.
        device: Where tokens come from and hooks compute, if accelerate places the LM; unset: it does not.
    """

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        name: str | Path,
        like: BaseLM | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._load, self._tokenizer, self._name = load, tokenizer, name
        self._like, self._device = like, device

    @cached_property
    def plain(self) -> PreTrainedModel:
        """The plain Hugging Face module."""
        return self._load().eval().requires_grad_(False)

    @cached_property
    def bridged(self) -> TransformerBridge:
        """The LM bridged to TransformerLens.

        Raises:
            ProbekitError: TransformerLens has no bridge for this architecture, or accelerate placed the LM.
        """
        if self._device is not None:
            raise ProbekitError(
                "lm.device_map is set, but TransformerLens takes no LM that accelerate placed; leave it unset"
            )
        return bridge(self._load(), self._tokenizer, self._name)

    @cached_property
    def _looked_up_on(self) -> BaseLM:
        """The LM whose bridge has the hooks: this one, or a shallow one where accelerate placed this one."""
        if self._like is not None:
            return self._like._looked_up_on
        if self._device is None:
            return self
        return BaseLM(lambda: shallow(self.plain.config), self._tokenizer, self._name)

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the LM, or of its part that reads text."""
        model = self.bridged.original_model if self._device is None else self.plain
        return model.config.get_text_config()

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.config.num_hidden_layers)

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return int(self.config.num_attention_heads)

    @cached_property
    def locations(self) -> dict[str, int]:
        """Every location that holds a vector for each position, and the vector's features."""
        return locations(self._looked_up_on.bridged)

    @property
    def architecture(self) -> str:
        """The class of the Hugging Face module."""
        return type(self._looked_up_on.bridged.original_model).__name__

    @property
    def takes_positions(self) -> bool:
        """Whether the positions of tokens can be given."""
        model = self._looked_up_on.bridged.original_model
        return "position_ids" in inspect.signature(model.forward).parameters

    def forward_pass(self, names: Sequence[str], model: PreTrainedModel | None = None) -> Backend:
        """The fastest backend that runs the LM with some hooks.

        Args:
            names: The hooks' full TransformerLens names.
            model: Run this one: the same LM, not bridged, that is to be trained.

        Raises:
            ProbekitError: Accelerate placed the LM, and only TransformerLens has one of the hooks.
        """
        model = self.plain if model is None else model
        if self._like is not None:
            found = self._like.forward_pass(names)
            return found.with_weights(model) if isinstance(found, HFBackend) else BridgeBackend(self.bridged)
        if self._device is None:
            return forward_pass(self.bridged, model, names)

        like = self._looked_up_on
        points = {name: find_hook_point(like.bridged, model, name) for name in names}
        known = {name: point for name, point in points.items() if point is not None}
        compared = dict.fromkeys(_in_layers(name, like.layers) for name in names)
        if len(known) < len(points) or not isinstance(like.forward_pass(list(compared)), HFBackend):
            missing = [name for name in names if name not in known] or names
            raise ProbekitError(
                f"lm.device_map is set, but only TransformerLens has all of {', '.join(missing)}, and it "
                "takes no LM that accelerate placed; choose other locations (conditioning.location, "
                "probe.locations), or leave lm.device_map unset"
            )
        return HFBackend(model, known, self._device)


def _in_layers(name: str, layers: int) -> str:
    """The hook of an LM of fewer layers that stands for another one's."""
    layer = layer_of(name) if name.startswith("blocks.") else None
    return name if layer is None else name.replace(f".{layer}.", f".{layer % layers}.", 1)


class Tuning:
    """What training makes of the plain LM: here nothing, it stays frozen.

    Args:
        model: The LM, changed in place by training.
        settings: Rank and layers of LoRA.
        seed: Seed of what is new.

    Attributes:
        model: The LM.
        parameters: What is trained.
    """

    def __init__(self, model: PreTrainedModel, settings: BaseSettings, seed: int) -> None:
        self.model = model
        self.parameters: list[nn.Parameter] = []

    def save(self, folder: Path) -> None:
        """Writes what was trained, if anything, to a folder of its own."""

    @staticmethod
    def load(folder: Path, model: PreTrainedModel, settings: BaseSettings) -> PreTrainedModel:
        """The tuned LM of a folder, from a fresh untuned one.

        Raises:
            ProbekitError: What is in the folder does not fit the LM.
        """
        return model


class Lora(Tuning):
    """Low-rank updates of linear maps, never of the unembedding (Hu et al. 2021, arXiv 2106.09685).

    The second halves of the updates begin as zero, so nothing is changed at first.
    """

    def __init__(self, model: PreTrainedModel, settings: BaseSettings, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        self._settings = LoraConfig(
            r=settings.rank,
            lora_alpha=LORA_SCALE * settings.rank,
            target_modules=_maps(model, settings.last_layers),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(), warnings.catch_warnings(), _on_their_devices(model):
            torch.manual_seed(seed)
            # GPT-2's maps are transposed, which peft finds out and warns of.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            self._tuned = get_peft_model(model, self._settings)
        if Path(self._settings.base_model_name_or_path or "").is_absolute():
            self._settings.base_model_name_or_path = None  # a run may be moved: the LM is in its own lm/
        self.model = model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        """Writes the updates in peft's own format, for `PeftModel.from_pretrained`."""
        from peft import get_peft_model_state_dict

        with atomic_folder(folder) as temporary:
            self._settings.save_pretrained(temporary)
            write_tensors(temporary / LORA_WEIGHTS, get_peft_model_state_dict(self._tuned))

    @staticmethod
    def load(folder: Path, model: PreTrainedModel, settings: BaseSettings) -> PreTrainedModel:
        """The LM with the updates merged into its weights, unless accelerate placed these."""
        from peft import set_peft_model_state_dict

        tuned = Lora(model, settings, seed=0)._tuned
        with _fitting(folder):
            report = set_peft_model_state_dict(tuned, read_tensors(folder / LORA_WEIGHTS))
            if report.unexpected_keys or any("lora_" in name for name in report.missing_keys):
                raise ValueError("updates of other maps")
        return model if is_placed(model) else tuned.merge_and_unload()


class Full(Tuning):
    """All weights are trained; the LM's own dropout stays off."""

    def __init__(self, model: PreTrainedModel, settings: BaseSettings, seed: int) -> None:
        self.model = model
        self.parameters = list(model.requires_grad_(True).parameters())

    def save(self, folder: Path) -> None:
        """Writes all weights in Hugging Face format, for `AutoModelForCausalLM.from_pretrained`."""
        weights: dict[int, tuple[str, Tensor]] = {}  # tied ones under the first of their names
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            weights.setdefault(id(tensor), (name, tensor.detach()))
        with atomic_folder(folder) as temporary:
            with without_bars_of_transformers():
                self.model.save_pretrained(temporary, state_dict=dict(weights.values()))
            # safetensors lets only a file's owner read it; a run may be shared.
            mode = (temporary / "config.json").stat().st_mode
            for path in temporary.glob("*.safetensors"):
                path.chmod(mode)

    @staticmethod
    def load(folder: Path, model: PreTrainedModel, settings: BaseSettings) -> PreTrainedModel:
        """The LM with all weights of the folder."""
        with _fitting(folder), without_bars_of_transformers():
            tuned, report = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            if report["missing_keys"]:
                raise ValueError("weights are missing")
            return tuned


TUNINGS: dict[str, type[Tuning]] = {"frozen": Tuning, "lora": Lora, "full": Full}
"""The kinds of `training.base.tuning`."""


def _maps(model: PreTrainedModel, last_layers: int | None) -> str | list[str]:
    """Which maps get updates, as peft takes it: all, or those of the last layers by their full names."""
    if last_layers is None:
        return "all-linear"
    from transformers.pytorch_utils import Conv1D

    depth = model.config.get_text_config().num_hidden_layers
    if last_layers > depth:
        raise ProbekitError(f"training.base.last_layers is {last_layers}, but the LM has {depth} layers")
    for path, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) == depth:
            return [
                f"{path}.{number}.{name}"
                for number in range(depth - last_layers, depth)
                for name, module in blocks[number].named_modules()
                if isinstance(module, nn.Linear | Conv1D)
            ]
    raise ProbekitError(
        f"training.base.last_layers is {last_layers}, but the LM does not list its layers in one place"
    )


@contextmanager
def _on_their_devices(model: PreTrainedModel) -> Iterator[None]:
    """Shows offloaded weights on the device that uses them, where LoRA's updates are to be made."""
    offloaded = [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.is_meta
    ]
    for module, name, weight in offloaded:
        no_memory = torch.zeros(1, device=module._hf_hook.execution_device).expand(weight.shape)
        setattr(module, name, nn.Parameter(no_memory, requires_grad=False))
    yield
    for module, name, weight in offloaded:
        setattr(module, name, weight)


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Turns what is raised where weights do not fit into one line."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise ProbekitError(
            f"{folder} does not fit the run's LM and settings; delete it and train that variant again"
        ) from error
