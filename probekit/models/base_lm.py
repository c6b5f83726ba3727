"""A base LM in the two forms in which it is used, and what training makes of it (`training.base`).

Training and reading use the plain Hugging Face module where hooks allow; a tuned one is saved, loaded and
bridged as any other LM is. Tuning through the bridge would train its own copies of some weights, those of a
fused attention, say, which nobody could save.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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
    blocks_of,
    find_hook_point,
    forward_pass,
)
from probekit.models.language_model import bridge, in_layers, is_placed, locations, shallow
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
        self._load, self._tokenizer, self._name, self._like = load, tokenizer, name, like
        self._device = device

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
                "lm.device_map is set, but TransformerLens takes no LM that accelerate placed"
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
        """The settings of the LM's text model."""
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
        like, depth = self._looked_up_on, self._looked_up_on.layers
        found = like.forward_pass(list(dict.fromkeys(in_layers(name, depth) for name in names)))
        points = {name: find_hook_point(like.bridged, model, name) for name in names}
        missing = [name for name, point in points.items() if point is None]
        if missing or not isinstance(found, HFBackend):
            raise ProbekitError(
                f"lm.device_map is set, but only TransformerLens has all of {', '.join(missing or names)}, "
                "and it takes no LM that accelerate placed; choose other locations (conditioning.location, "
                "probe.locations), or leave lm.device_map unset"
            )
        known = {name: point for name, point in points.items() if point is not None}
        return HFBackend(model, known, self._device)


class Tuning(Protocol):
    """What becomes of the plain LM that an adapter is trained on.

    Attributes:
        model: The LM, changed in place by training.
        parameters: What is trained.
    """

    model: PreTrainedModel
    parameters: list[nn.Parameter]

    def __init__(self, model: PreTrainedModel, settings: BaseSettings, seed: int) -> None: ...

    def train(self, mode: bool) -> None:
        """Begins, or ends, what happens in training alone."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """What was trained, by name."""
        ...

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes weights to a folder of their own, if anything was trained."""
        ...

    @staticmethod
    def load(folder: Path, model: PreTrainedModel, settings: BaseSettings) -> PreTrainedModel:
        """The tuned LM of a folder, from a fresh untuned one.

        Raises:
            ProbekitError: What is in the folder does not fit the LM.
        """
        ...


class Frozen:
    """The LM stays as it is."""

    def __init__(self, model: PreTrainedModel, settings: BaseSettings, seed: int) -> None:
        self.model = model
        self.parameters: list[nn.Parameter] = []

    def train(self, mode: bool) -> None:
        """As `Tuning` has it."""

    def weights(self) -> dict[str, Tensor]:
        """As `Tuning` has it: none."""
        return {}

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """As `Tuning` has it."""

    @staticmethod
    def load(folder: Path, model: PreTrainedModel, settings: BaseSettings) -> PreTrainedModel:
        """As `Tuning` has it."""
        return model


class Lora:
    """Low-rank updates of linear maps, never of the unembedding (Hu et al. 2021, arXiv 2106.09685).

    Args:
        model: Its linear maps are wrapped in place.
        settings: Rank and layers.
        seed: Seed of the updates' first halves; the second ones are zero, so nothing is changed at first.
    """

    def __init__(self, model: PreTrainedModel, settings: BaseSettings, seed: int) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        self._settings = LoraConfig(
            r=settings.rank,
            lora_alpha=LORA_SCALE * settings.rank,
            target_modules=_maps(model, settings.last_layers),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(seed)
            # GPT-2's maps are transposed, as peft finds out by itself, and says.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            with _on_their_devices(model):
                self._tuned = get_peft_model(model, self._settings)
        if Path(self._settings.base_model_name_or_path or "").is_absolute():
            self._settings.base_model_name_or_path = None  # a run may be moved: the LM is in its own lm/
        self.model = model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._dropouts = [layer.lora_dropout for layer in model.modules() if isinstance(layer, LoraLayer)]

    def train(self, mode: bool) -> None:
        """As `Tuning` has it: dropout before the updates."""
        for dropout in self._dropouts:
            dropout.train(mode)

    def weights(self) -> dict[str, Tensor]:
        """As `Tuning` has it: the updates."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self._tuned)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """As `Tuning` has it: in peft's own format, for `PeftModel.from_pretrained`."""
        with atomic_folder(folder) as temporary:
            self._settings.save_pretrained(temporary)
            write_tensors(temporary / LORA_WEIGHTS, weights)

    @staticmethod
    def load(folder: Path, model: PreTrainedModel, settings: BaseSettings) -> PreTrainedModel:
        """As `Tuning` has it: the updates are merged into the LM's weights, if these are at hand."""
        from peft import set_peft_model_state_dict

        tuned = Lora(model, settings, seed=0)._tuned
        with _fitting(folder):
            report = set_peft_model_state_dict(tuned, read_tensors(folder / LORA_WEIGHTS))
            if report.unexpected_keys or any("lora_" in name for name in report.missing_keys):
                raise ValueError("updates of other maps")
        return model if is_placed(model) else tuned.merge_and_unload()


class Full:
    """All weights are trained; the LM's own dropout stays off, as the adapter's training has it."""

    def __init__(self, model: PreTrainedModel, settings: BaseSettings, seed: int) -> None:
        self.model = model
        self.parameters = list(model.requires_grad_(True).parameters())

    def train(self, mode: bool) -> None:
        """As `Tuning` has it."""

    def weights(self) -> dict[str, Tensor]:
        """As `Tuning` has it: all of the LM's."""
        once: dict[int, tuple[str, Tensor]] = {}  # tied ones under the first of their names
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            once.setdefault(id(tensor), (name, tensor))
        return {name: tensor.detach() for name, tensor in once.values()}

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """As `Tuning` has it: in Hugging Face format, for `AutoModelForCausalLM.from_pretrained`."""
        with atomic_folder(folder) as temporary:
            with without_bars_of_transformers():
                self.model.save_pretrained(temporary, state_dict=weights)
            # safetensors lets only a file's owner read it; a run may be shared.
            mode = (temporary / "config.json").stat().st_mode
            for path in temporary.glob("*.safetensors"):
                path.chmod(mode)

    @staticmethod
    def load(folder: Path, model: PreTrainedModel, settings: BaseSettings) -> PreTrainedModel:
        """As `Tuning` has it."""
        with _fitting(folder), without_bars_of_transformers():
            tuned, report = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            if report["missing_keys"]:
                raise ValueError("weights are missing")
            return tuned


TUNINGS: dict[str, type[Tuning]] = {"frozen": Frozen, "lora": Lora, "full": Full}
"""The kinds of `training.base.tuning`."""


def _maps(model: PreTrainedModel, last_layers: int | None) -> str | list[str]:
    """Which maps get updates, as peft takes it: all, or those of the last layers by their full names."""
    if last_layers is None:
        return "all-linear"
    from transformers.pytorch_utils import Conv1D

    depth = model.config.get_text_config().num_hidden_layers
    blocks = blocks_of(model)
    if last_layers > depth or blocks is None:
        what = f"has {depth} layers" if last_layers > depth else "does not list its layers in one place"
        raise ProbekitError(f"training.base.last_layers is {last_layers}, but the LM {what}")
    return [
        f"{path}.{name}"
        for path, block in list(blocks.items())[depth - last_layers :]
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]


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
