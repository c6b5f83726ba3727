"""Which settings each stage of training uses.

Stages with equal `stage_settings` leave equal files: a resumed run keeps a stage only while its settings are
equal, and the runs of a sweep share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from probekit.config import Config, VariantName, setting_names, setting_value
from probekit.models.depth_ensemble import MEMBERS
from probekit.models.mixing import VARIANTS

ADAPTERS = tuple(f"adapter/{variant}" for variant in VARIANTS)
JOINT = tuple(f"adapter/{name}" for name, variant in VARIANTS.items() if variant.joint)
TEMPERED = tuple(f"adapter/{name}" for name, variant in VARIANTS.items() if variant.tempered)
DEPTH = tuple(f"depth/{member}" for member in MEMBERS)
ROUTED = tuple(f"depth/{name}" for name, member in MEMBERS.items() if member.reads != "last")
DISTILLED = tuple(f"depth/{name}" for name, member in MEMBERS.items() if member.distilled)
OUT_OF_FOLD = tuple(f"adapter/{name}" for name, variant in VARIANTS.items() if variant.out_of_fold)

USED_BY: dict[str, tuple[str, ...]] = {
    "method": (),
    "device": (),
    "evaluation": (),
    "generation": (),
    "probe": (),
    "intervene": (),
    "subnetwork": (),
    "continuation": (),
    "seed": ("lm/new", "planner", *ADAPTERS, *DEPTH),
    "corpus": ("corpus",),
    "actions": ("corpus",),
    # The corpus is in tokens of the LM.
    "lm.name": ("corpus", "lm"),
    "lm.revision": ("corpus", "lm"),
    "lm.trust_remote_code": ("corpus", "lm"),
    "lm.vocabulary": ("corpus", "lm/new"),
    "lm.bos": ("corpus",),
    "lm.dtype": (*ADAPTERS, *DEPTH),
    "lm.device_map": (),
    "lm.compress": ("lm",),
    "lm": ("lm/new",),
    "planner": ("planner",),
    "conditioning": ADAPTERS,
    "mixing.variants": (),
    "mixing.fraction": ("adapter/mixed",),
    "mixing.temperature": TEMPERED,
    "mixing.learn_temperature": TEMPERED,
    "depth": ROUTED,
    "depth.members": (),
    "depth.variant": DEPTH,
    "depth.layer_loss": DEPTH,
    "depth.distillation": DISTILLED,
    "training.window": ("lm/new", *ADAPTERS, *DEPTH),
    "training.precision": ("lm/new", "planner", *ADAPTERS, *DEPTH),
    "training.save_minutes": (),
    "training.accumulate": ("lm/new", "planner", *ADAPTERS, *DEPTH),
    "training.lm": ("lm/new",),
    "training.planner": ("planner",),
    "training.planner.folds": ("planner/fold", *OUT_OF_FOLD),
    "training.adapter": ADAPTERS,
    "training.joint": JOINT,
    "training.depth": DEPTH,
    "training.base": (*ADAPTERS, *DEPTH),
}
"""The stages that use a setting, or all settings of a section; a setting's own row wins over its section's.
`lm/new` is the stage `lm` of an LM that is trained, not pre-trained."""

EXECUTION_ONLY = ("training.save_minutes", "lm.device_map")
"""Settings of training that change how it runs, and nothing of its results."""

TRAINING_SECTIONS = ("lm", "planner", "conditioning", "depth", "training")
"""Sections whose settings only matter in training."""

CHOOSE_STAGES = ("method", "mixing.variants", "depth.members")
"""Settings that no stage uses, but that decide which stages there are."""

ONLY_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "lm.vocabulary": ("lm.name", (None,)),
    "actions.encoder": ("actions.labels", ("clusters", "planted")),
    "actions.dimensions": ("actions.labels", ("clusters", "planted")),
    "actions.k": ("actions.labels", ("clusters", "planted")),
    "actions.fit_sentences": ("actions.labels", ("clusters", "planted")),
    "conditioning.location": ("conditioning.kind", ("adapter",)),
    "conditioning.skip_layers": ("conditioning.kind", ("adapter",)),
    "training.base.learning_rate": ("training.base.tuning", ("lora", "full")),
    "training.base.rank": ("training.base.tuning", ("lora",)),
    "training.base.last_layers": ("training.base.tuning", ("lora",)),
}
"""Settings that have an effect only if another setting has one of these values."""


def stage_settings(config: Config, stage: str) -> dict[str, Any]:
    """The settings that a stage, or one that it builds on, uses: values by dotted name."""
    stages = {stage, *_built_on(config, stage)}
    return {
        name: setting_value(config, name)
        for name in setting_names()
        if _switched_on(config, name) and not stages.isdisjoint(stages_that_use(name))
    }


def why_idle(config: Config, name: str) -> str | None:
    """Why a setting changes nothing that is trained; None where it does."""
    if name in CHOOSE_STAGES or any(name in stage_settings(config, s) for s in stages_of(config)):
        return None
    if not _switched_on(config, name):
        switch, values = ONLY_WITH[name]
        wanted = " or ".join("unset" if value is None else str(value) for value in values)
        return f"it goes with {switch} {wanted}, which is {setting_value(config, switch)}"
    if users := stages_that_use(name):
        if "lm/new" in users and config.lm.name is not None:
            return f"lm.name is {config.lm.name}, and that LM is not trained"
        return f"only {', '.join(users)} would use it, and none of these is trained"
    return "no stage of training uses it"


def idle_in_training(config: Config, names: Iterable[str]) -> Iterator[str]:
    """A line for each of some settings that is one of training and changes nothing of what is trained."""
    for name in names:
        trains = name.split(".")[0] in TRAINING_SECTIONS and name not in EXECUTION_ONLY
        if trains and (reason := why_idle(config, name)):
            yield f"{name} changes nothing here: {reason}"


def stages_of(config: Config) -> list[str]:
    """All stages of a training, in their order; a pre-trained LM is looked up before the corpus is built."""
    variants, ensembles = variants_of(config), config.method == "depth-ensemble"
    return [
        *(["lm", "corpus"] if config.lm.name else ["corpus", "lm"]),
        *(["planner"] if variants or not ensembles else []),
        *(f"planner/fold{number}" for number in range(folds_of(config))),
        *(f"adapter/{name}" for name in variants),
        *(f"depth/{name}" for name in (config.depth.members if ensembles else ())),
    ]


def stages_before(config: Config, stage: str) -> list[str]:
    """The stages that a stage builds on."""
    return [name for name in stages_of(config) if name != stage and name in _built_on(config, stage)]


def variants_of(config: Config) -> list[VariantName]:
    """The variants whose adapters are trained."""
    wanted = (config.depth.variant,) if config.method == "depth-ensemble" else config.mixing.variants
    return [name for name in wanted if name in VARIANTS]


def folds_of(config: Config) -> int:
    """How many planners are trained for out-of-fold scores: none where no variant needs them."""
    needed = any(VARIANTS[name].out_of_fold for name in variants_of(config))
    return config.training.planner.folds if needed else 0


def stages_that_use(setting: str) -> tuple[str, ...]:
    """The stages that use a setting, given by its dotted name."""
    sections = [*itertools.accumulate(setting.split("."), "{}.{}".format)]  # a, a.b, a.b.c
    return next(USED_BY[section] for section in reversed(sections) if section in USED_BY)


def _switched_on(config: Config, name: str) -> bool:
    """Whether the other settings let a setting do anything."""
    if name not in ONLY_WITH:
        return True
    switch, values = ONLY_WITH[name]
    return setting_value(config, switch) in values


def _built_on(config: Config, stage: str) -> tuple[str, ...]:
    """All stages that a stage builds on, directly or by way of others."""
    lm = ("lm",) if config.lm.name else ("lm", "lm/new")
    if stage == "lm":
        return lm if config.lm.name else ("corpus", *lm)  # a pre-trained one is there before any corpus
    if stage in ("adapter/fixed", "adapter/uniform"):  # they plan nothing
        return ("corpus", *lm)
    if stage.startswith("planner/fold"):
        return ("corpus", "planner", "planner/fold")
    if stage in DEPTH:
        conditioned = f"adapter/{config.depth.variant}"
        return (conditioned, *_built_on(config, conditioned)) if conditioned in ADAPTERS else ("corpus", *lm)
    return {"corpus": (), "planner": ("corpus",)}.get(stage, ("corpus", *lm, "planner"))
