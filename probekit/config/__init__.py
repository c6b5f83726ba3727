"""Every setting of probekit: typed, validated, documented.

The field docs are the help text of the commands, so each says what the setting does and in which unit.
"""

from probekit.config.base import MemberName, ModelName, ProbedName, SolverName, VariantName
from probekit.config.complete import Config, setting_names
from probekit.config.corpus import ActionSettings, CorpusSettings, PlantedSettings
from probekit.config.evaluation import EvaluationSettings, GenerationSettings
from probekit.config.files import preset_names, preset_values, yaml_values
from probekit.config.models import (
    ConditioningSettings,
    DepthSettings,
    DistillationSettings,
    LanguageModelSettings,
    MixingSettings,
    PlannerSettings,
)
from probekit.config.names import merge, nest, setting_value, settings_of, unknown_setting
from probekit.config.probing import InterventionSettings, ProbeSettings, SubnetworkSettings
from probekit.config.training import (
    BaseSettings,
    JointSettings,
    PlannerStageSettings,
    StageSettings,
    TrainingSettings,
)

__all__ = [
    "ActionSettings",
    "BaseSettings",
    "ConditioningSettings",
    "Config",
    "CorpusSettings",
    "DepthSettings",
    "DistillationSettings",
    "EvaluationSettings",
    "GenerationSettings",
    "InterventionSettings",
    "JointSettings",
    "LanguageModelSettings",
    "MemberName",
    "MixingSettings",
    "ModelName",
    "PlannerSettings",
    "PlannerStageSettings",
    "PlantedSettings",
    "ProbeSettings",
    "ProbedName",
    "SolverName",
    "StageSettings",
    "SubnetworkSettings",
    "TrainingSettings",
    "VariantName",
    "merge",
    "nest",
    "preset_names",
    "preset_values",
    "setting_names",
    "setting_value",
    "settings_of",
    "unknown_setting",
    "yaml_values",
]
