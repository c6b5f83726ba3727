"""Whether what lies in the folders of a sweep's runs is what the sweep asks for, and was made alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from probekit.config import Config, setting_value
from probekit.evaluation.perplexity import record_of
from probekit.run import Run
from probekit.run_folder import RECORDED
from probekit.stage_settings import stage_settings, stages_of
from probekit.storage import read_json

UNTOLD = ("prompts", "batch_size")
"""Settings of generation that need not be what is recorded: how many were there; what changes nothing."""


def strays(run: Run, config: Config) -> Iterator[str]:
    """What in a trained and evaluated run is not as its settings in a sweep would have it."""
    used = {
        "mixing.variants",
        *(name for stage in stages_of(config) for name in stage_settings(config, stage)),
    }
    yield from _differences(
        {name: setting_value(run.config, name) for name in used},
        {name: setting_value(config, name) for name in used},
        "was trained with",
        "delete its folder",
    )
    yield from _differences(
        {f"evaluation.{name}": value for name, value in run.evaluation()["settings"].items()},
        {f"evaluation.{name}": value for name, value in record_of(config).items()},
        "was evaluated with",
        "delete its evaluation.json",
    )
    if not (run.folder / "generation.json").is_file():
        return
    wanted = config.generation.model_dump(mode="json", exclude={*UNTOLD})
    wanted |= {"seeds": [*(config.generation.seeds or (config.seed,))]}
    yield from _differences(
        {f"generation.{name}": value for name, value in run.generation_metrics()["settings"].items()},
        {f"generation.{name}": value for name, value in wanted.items()},
        "generated text with",
        "delete its generation.json",
    )


def come_to_in(run: Run) -> dict[tuple[str, Any], str]:
    """What settings came to in a run that do not tell all, by their name and value."""
    stages = read_json(run.folder / "run.json")["stages"].values()
    return {
        (name, setting_value(run.config, name)): facts[fact]
        for name, fact in RECORDED.items()
        for facts in stages
        if fact in facts
    }


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], verb: str, remedy: str
) -> Iterator[str]:
    for name in sorted(wanted):
        if name in found and found[name] != wanted[name]:
            yield f"{verb} {name} {found[name]!r}, and the sweep has {wanted[name]!r}; {remedy}"
