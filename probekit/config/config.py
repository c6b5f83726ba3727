"""All settings together: from presets, YAML files and single values, with errors that name the setting."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from probekit.config.sections import (
    ActionSettings,
    ConditioningSettings,
    ContinuationSettings,
    CorpusSettings,
    DepthSettings,
    EvaluationSettings,
    GenerationSettings,
    InterventionSettings,
    LanguageModelSettings,
    MixingSettings,
    PlannerSettings,
    ProbeSettings,
    SubnetworkSettings,
    TrainingSettings,
)
from probekit.config.types import Seed, Settings
from probekit.errors import ProbekitError

if TYPE_CHECKING:
    from probekit.statistics import Resampling

PATHS = ("corpus.path", "actions.encoder", "lm.name", "evaluation.questions_file")
"""Settings that may be paths."""

PRESETS = resources.files("probekit.config") / "presets"


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
    continuation: ContinuationSettings = ContinuationSettings()

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.lm.device_map is not None:
            given = f"lm.device_map is {self.lm.device_map!r}, but"
            if self.method == "depth-ensemble":
                raise ValueError(f"{given} method is 'depth-ensemble', which needs the LM on one device")
            if self.training.base.tuning == "full":
                raise ValueError(
                    f"{given} training.base.tuning is 'full', which takes an LM on one device; give lora"
                )
        if self.corpus.max_sentences is not None and self._corpus_is_of_labels():
            raise ValueError(
                f"corpus.max_sentences is {self.corpus.max_sentences}, but the rows of probe.labels "
                "are of whole texts; leave it unset"
            )
        if self.corpus.max_sentences is not None and self.corpus.planted.examples > 1:
            raise ValueError(
                f"corpus.max_sentences is {self.corpus.max_sentences}, but corpus.planted.examples is "
                f"{self.corpus.planted.examples}, all of them whole; leave it unset"
            )
        if self.depth.variant not in ("none", *self.mixing.variants):
            raise ValueError(
                f"depth.variant is {self.depth.variant!r}, which is not among mixing.variants: "
                f"{', '.join(self.mixing.variants)}"
            )
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a validated config from nested plain values.

        Raises:
            ProbekitError: One line that names the first setting that is wrong, its value and the remedy.
        """
        if not isinstance(values, Mapping):
            raise ProbekitError(f"settings are a {type(values).__name__}; give them by name, as a dictionary")
        try:
            # Over the defaults of `Config`: those of a section's class differ, as in `training.lm.epochs`.
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
        """The complete config as YAML text that `from_yaml` reads back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, explicit_end=True)

    def _corpus_is_of_labels(self) -> bool:
        """Whether the table of labels is the corpus, too, so that its rows are whole texts."""
        if self.corpus.path is None or self.probe.labels is None:
            return False
        return user_path(self.corpus.path).absolute() == user_path(self.probe.labels).absolute()

    @property
    def resampling(self) -> Resampling:
        """How intervals are resampled: keyword arguments of the functions of `probekit.statistics`."""
        return {"resamples": self.evaluation.resamples, "seed": self.seed}

    def with_absolute_paths(self) -> Self:
        """A copy in which whatever is a path of this machine holds in any folder that it is used from."""
        given = {name: value for name in PATHS if (value := setting_value(self, name))}
        expanded = {name: os.path.expanduser(value) for name, value in given.items() if value != "tfidf"}  # noqa: PTH111
        paths = {name: Path(value).absolute() for name, value in expanded.items()}
        # Not `Path.exists`, which raises where a name is too long for the system.
        return self.override({name: path for name, path in paths.items() if os.path.exists(path)})  # noqa: PTH110

    def override(self, values: Mapping[str, Any]) -> Self:
        """A copy with settings replaced, given by dotted name: `config.override({"lm.layers": 2})`."""
        return self.from_dict(merge(self.model_dump(), nest(values)))


def user_path(path: str | Path) -> Path:
    """A path as a user gives it, its `~` expanded.

    Raises:
        ProbekitError: It is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ProbekitError(f"{path!r} is no path; give a string or a Path")
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ProbekitError(f"{str(path)!r} is no path that the system can have; correct it")
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own raises where there is no such user


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(
        path.name.removesuffix(".yaml") for path in PRESETS.iterdir() if path.name.endswith(".yaml")
    )


def preset_values(name: str) -> dict[str, Any]:
    """The nested values that a preset sets."""
    names = preset_names()
    if not isinstance(name, str) or name not in names:
        raise ProbekitError(
            f"unknown preset {name!r}{_nearest(str(name), names)}; there are {', '.join(names)}"
        )
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text("utf-8"))


def yaml_values(path: str | Path) -> dict[str, Any]:
    """The nested values in a YAML file of settings."""
    try:
        values = yaml.safe_load(user_path(path).read_text("utf-8"))
    except OSError as error:
        raise ProbekitError(f"config file {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProbekitError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise ProbekitError(
            f"config file {path} holds a {type(values).__name__}; it must hold named settings"
        )
    return values or {}


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turns dotted names into nested mappings: `{"a.b": 1}` to `{"a": {"b": 1}}`."""
    if not isinstance(values, Mapping):
        raise ProbekitError(f"settings are a {type(values).__name__}; give them by name, as a dictionary")
    nested: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise ProbekitError(f"{name!r} is no name of a setting; give dotted names such as 'probe.layers'")
        section = nested
        *sections, last = name.split(".")
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ProbekitError(f"{name} is given, and {part} as a whole too; give one of them")
        section[last] = value
    return nested


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested merge in which `over` wins; neither argument is changed."""
    merged = dict(base)
    for key, value in over.items():
        both_nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_nested else value
    return merged


def settings_of(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """All settings below a section by dotted name, each with its pydantic `FieldInfo`."""
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields |= settings_of(kind, f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


def setting_names() -> list[str]:
    """Dotted names of all settings."""
    return list(settings_of(Config))


def setting_value(config: BaseModel, name: str) -> Any:
    """The value of a setting, given by its dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def unknown_setting(name: str, known: list[str]) -> ProbekitError:
    """The error for a setting that does not exist, with the nearest that does."""
    return ProbekitError(f"unknown setting {name!r}{_nearest(name, known)}")


def _nearest(name: str, known: list[str]) -> str:
    """The end of an error about a wrong name: the most similar known one, if its last part is similar too."""

    def similarity(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, one, other).ratio()

    def last(name: str) -> str:
        return name.rpartition(".")[2]

    similar = [other for other in known if similarity(last(name), last(other)) >= 0.6]
    best = max(similar, key=lambda other: similarity(name, other), default="")
    return f"; did you mean {best!r}?" if similarity(name, best) >= 0.5 else ""


def _explain(error: ValidationError) -> str:
    """One line for the first of pydantic's errors."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return str(unknown_setting(name, setting_names()))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name} is {first['input']!r}: {message[0].lower()}{message[1:]}"
