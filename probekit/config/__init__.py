"""Every setting of probekit: typed, validated, documented.

The field docs are the help text of the commands, so each says what the setting does and in which unit.
"""

from probekit.config.config import (
    Config,
    nest,
    preset_names,
    setting_names,
    setting_value,
    settings_of,
    unknown_setting,
    user_path,
    yaml_values,
)
from probekit.config.positions import NAMED, Position, as_position, before_last, nearest, reading_order
from probekit.config.sections import (
    ActionSettings,
    ConditioningSettings,
    CorpusSettings,
    DepthSettings,
    DistillationSettings,
    GenerationSettings,
    InterventionSettings,
    LanguageModelSettings,
    MixingSettings,
    PlannerSettings,
    PlannerStageSettings,
    PlantedSettings,
    ProbeSettings,
    StageSettings,
    SubnetworkSettings,
    TuningSettings,
)
from probekit.config.types import BosRule, MemberName, ModelName, ProbedName, SolverName, VariantName
