"""All settings together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import ValidationError, model_validator

from probekit.config.base import Seed, Settings
from probekit.config.corpus import ActionSettings, CorpusSettings
from probekit.config.evaluation import EvaluationSettings, GenerationSettings
from probekit.config.files import preset_values, yaml_values
from probekit.config.models import (
    ConditioningSettings,
    DepthSettings,
    LanguageModelSettings,
    MixingSettings,
    PlannerSettings,
)
from probekit.config.names import merge, nest, settings_of, unknown_setting
from probekit.config.probing import InterventionSettings, ProbeSettings, SubnetworkSettings
from probekit.config.training import TrainingSettings
from probekit.errors import ProbekitError


class Config(Settings):
    """All settings of a run."""

    method: Literal["planner", "depth-ensemble"] = "planner"
    """What is trained: a planner and an adapter for each variant (arXiv 2410.12492), or the members of a
    depth ensemble (arXiv 2410.13077)."""
    seed: Seed = 0
    """Seed of everything random after the corpus, which has its own."""
    device: str = "auto"
    """Where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1."""
    corpus: CorpusSettings = CorpusSettings()
    actions: ActionSettings = ActionSettings()
    lm: LanguageModelSettings = LanguageModelSettings()
    planner: PlannerSettings = PlannerSettings()
    conditioning: ConditioningSettings = ConditioningSettings()
    mixing: MixingSettings = MixingSettings()
    depth: DepthSettings = DepthSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    generation: GenerationSettings = GenerationSettings()
    probe: ProbeSettings = ProbeSettings()
    intervene: InterventionSettings = InterventionSettings()
    subnetwork: SubnetworkSettings = SubnetworkSettings()

    @model_validator(mode="after")
    def _shards_what_can_be(self) -> Self:
        if self.lm.sharded and self.method == "depth-ensemble":
            raise ValueError(
                "lm.sharded is true, but method is 'depth-ensemble', whose layers share the LM's head; give "
                "method planner, or lm.sharded false"
            )
        return self

    @model_validator(mode="after")
    def _knows_the_variant(self) -> Self:
        if self.depth.variant not in ("none", *self.mixing.variants):
            raise ValueError(
                f"depth.variant is {self.depth.variant!r}, which mixing.variants has not; it has "
                f"{', '.join(self.mixing.variants)}"
            )
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a validated config from nested plain values.

        Raises:
            ProbekitError: One line that names the first setting that is wrong, its value and the remedy.
        """
        try:
            # Over the defaults of the whole: a section's own may be others, as the epochs of the LM's stage.
            return cls.model_validate(merge(cls().model_dump(), values))
        except ValidationError as error:
            raise ProbekitError(_explain(error)) from None

    @classmethod
    def from_preset(cls, name: str) -> Self:
        """The config of a shipped preset, by name (see `preset_names`)."""
        return cls.from_dict(preset_values(name))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """The config in a YAML file; settings that it leaves out have their defaults."""
        return cls.from_dict(yaml_values(path))

    def to_yaml(self) -> str:
        """The complete, resolved config as YAML text that `from_yaml` reads back to an equal config.

        It ends in YAML's own mark of an end, so that a file that was cut off can be told.
        """
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, explicit_end=True)

    def override(self, values: Mapping[str, Any]) -> Self:
        """A copy with settings replaced, given by dotted name: `config.override({"lm.layers": 2})`."""
        return self.from_dict(merge(self.model_dump(), nest(values)))


def setting_names() -> list[str]:
    """Dotted names of all settings."""
    return list(settings_of(Config))


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return str(unknown_setting(name, setting_names()))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name} is {first['input']!r}: {message[0].lower()}{message[1:]}"
