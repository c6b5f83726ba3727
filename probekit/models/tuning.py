"""Tuning of the base LM together with an adapter or depth ensemble: low-rank updates, or all weights.

The plain Hugging Face module is tuned, never the bridge: that would train its own copies of some weights,
such as those of a fused attention, which nobody could save.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from probekit.config import TuningSettings
from probekit.errors import ProbekitError
from probekit.io import atomic_folder, read_tensors, write_tensors
from probekit.models.language_model import is_placed, save_model
from probekit.models.pretrained import layers_of
from probekit.progress import without_bars_of_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LORA_SCALE = 2.0
"""LoRA's alpha / rank."""

LORA_WEIGHTS = "adapter_model.safetensors"
"""The file of low-rank updates, as peft calls it."""


class Lora:
    """Low-rank updates of linear maps, never of the unembedding (Hu et al. 2021, arXiv 2106.09685).

    The second halves of the updates begin as zero, so nothing is changed at first.

    Args:
        model: The LM, changed in place by training.
        settings: Rank and layers.
        seed: Seed of what is new.

    Attributes:
        model: The LM.
        parameters: What is trained, float32.
    """

    def __init__(self, model: PreTrainedModel, settings: TuningSettings, seed: int) -> None:
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
    def load(
        folder: Path,
        base: Callable[[], PreTrainedModel],
        settings: TuningSettings,
        dtype: torch.dtype,
        *,
        trust_remote_code: bool = False,
    ) -> PreTrainedModel:
        """The LM with the updates, merged into weights of float32 that accelerate did not place."""
        from peft import set_peft_model_state_dict

        model = base()
        tuned = Lora(model, settings, seed=0)._tuned
        with _fitting(folder):
            report = set_peft_model_state_dict(tuned, read_tensors(folder / LORA_WEIGHTS))
            if report.unexpected_keys or any("lora_" in name for name in report.missing_keys):
                raise ValueError("updates of other maps")
        # Weights of half precision would round small updates away.
        beside = is_placed(model) or model.dtype != torch.float32
        return model if beside else tuned.merge_and_unload()


class Full:
    """All weights are trained; the LM's own dropout stays off. Arguments and attributes as in `Lora`."""

    def __init__(self, model: PreTrainedModel, settings: TuningSettings, seed: int) -> None:
        self.model = model
        self.parameters = list(model.requires_grad_(True).parameters())

    def save(self, folder: Path) -> None:
        """Writes all weights in Hugging Face format, for `AutoModelForCausalLM.from_pretrained`."""
        with atomic_folder(folder) as temporary:
            save_model(self.model, temporary)

    @staticmethod
    def load(
        folder: Path,
        base: Callable[[], PreTrainedModel],
        settings: TuningSettings,
        dtype: torch.dtype,
        *,
        trust_remote_code: bool = False,
    ) -> PreTrainedModel:
        """The LM with all weights of the folder."""
        from transformers import AutoModelForCausalLM

        with _fitting(folder), without_bars_of_transformers():
            tuned, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
            if report["missing_keys"]:
                raise ValueError("weights are missing")
            return tuned


Tuning = Lora | Full
"""What is trained of an LM's plain module."""

TUNINGS: dict[str, type[Lora] | type[Full]] = {"lora": Lora, "full": Full}
"""The kinds of `training.base.tuning` that train anything. `load` takes the folder that `save` wrote, what
loads the untuned LM, its settings, and the dtype of weights that are all in the folder."""


def _maps(model: PreTrainedModel, last_layers: int | None) -> str | list[str]:
    """Which maps get updates, as peft takes it: all, or those of the last layers by their full names."""
    if last_layers is None:
        return "all-linear"
    from transformers.pytorch_utils import Conv1D

    depth = model.config.get_text_config().num_hidden_layers
    if last_layers > depth:
        raise ProbekitError(f"training.base.last_layers is {last_layers}, but the LM has {depth} layers")
    if (found := layers_of(model)) is None:
        raise ProbekitError(
            f"training.base.last_layers is {last_layers}, but the LM does not list its layers in one place"
        )
    path, layers = found
    return [
        f"{path}.{number}.{name}"
        for number in range(depth - last_layers, depth)
        for name, module in layers[number].named_modules()
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
