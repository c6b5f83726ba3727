"""What a report is made of: a run's results, read when they are asked for, and what they were made with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from probekit.causal.intervene import InterventionResults
from probekit.causal.subnetwork import SubnetworkResults
from probekit.config import Config, setting_names, setting_value
from probekit.errors import ProbekitError
from probekit.evaluation.perplexity import evaluation_record
from probekit.io import read_json, read_table
from probekit.models.mixing import VARIANTS
from probekit.probing.over_training import TrainingProbes
from probekit.probing.probe import ProbeResults
from probekit.probing.results import ProbeRecord, read_probe_record
from probekit.run.run import Run
from probekit.run.stages import stages_of

EVALUATION, GENERATION, PROBES = "evaluation.json", "generation.json", "probes/results.parquet"
PROBE_SETTINGS, METRICS, PROVENANCE = "probes/settings.json", "metrics.jsonl", "provenance.json"
"""Files of results, and of how they were made."""

CORPUS = "corpus/facts.json"
"""What a whole corpus has."""

INTERVENTIONS, SUBNETWORKS = "interventions/{}/results.parquet", "subnetworks/{}/results.parquet"
"""Files of a variant's results."""

UNFIT = (AttributeError, ArithmeticError, IndexError, KeyError, TypeError, ValueError)
"""What is raised about a file that can be read, and does not hold what it should."""

T = TypeVar("T")


class Findings:
    """A run and its results; what is damaged raises where it is asked for.

    Attributes:
        run: The run.
        stages: Facts of the finished stages by name.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stages: dict[str, dict[str, Any]] = read_json(run.folder / "run.json")["stages"]

    def has(self, file: str) -> bool:
        """Whether a file is there."""
        return (self.run.folder / file).is_file()

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.run.folder.resolve().name

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Versions, commit, seeds and machine."""
        return read_json(self.run.folder / PROVENANCE)

    @cached_property
    def evaluation(self) -> dict[str, pd.DataFrame]:
        """The tables of evaluation.json."""
        found = self.run.evaluation()
        return {name: pd.DataFrame(rows) for name, rows in found.items() if name != "settings"}

    @cached_property
    def generation(self) -> dict[str, Any]:
        """What generation.json holds; `metrics` as a table."""
        found = self.run.generation_metrics()
        return found | {"metrics": pd.DataFrame(found["metrics"]).astype({"value": float})}

    @cached_property
    def probes(self) -> ProbeResults:
        """The probes' table and notes."""
        notes = self.probe_record.notes if self.has(PROBE_SETTINGS) else []
        return ProbeResults(self.run.probes(), self.run.folder / "probes", notes)

    @cached_property
    def probe_record(self) -> ProbeRecord:
        """What probes/settings.json holds."""
        return read_probe_record(self.run.folder)

    def variants_with(self, file: str) -> list[str]:
        """Variants that such a file of results is there of."""
        return [name for name in ("none", *VARIANTS) if self.has(file.format(name))]

    def interventions(self, variant: str) -> InterventionResults:
        """What interventions in a variant found."""
        file = self.run.folder / INTERVENTIONS.format(variant)
        return InterventionResults(read_table(file), file.parent, _notes(file.parent))

    def subnetwork(self, variant: str) -> SubnetworkResults:
        """The subnetwork of a variant."""
        folder = (self.run.folder / SUBNETWORKS.format(variant)).parent
        names = ("results", "mask", "candidates")
        table, mask, candidates = (read_table(folder / f"{name}.parquet") for name in names)
        return SubnetworkResults(table, mask, candidates, folder, _notes(folder))

    @property
    def probed_stages(self) -> list[str]:
        """Stages whose checkpoints were probed."""
        return [stage for stage in stages_of(self.run.config) if self.run.probes_file(stage).is_file()]

    def over_training_file(self, stage: str) -> str:
        """The file of what was found at a stage's checkpoints."""
        return self.run.probes_file(stage).relative_to(self.run.folder).as_posix()

    def over_training(self, stage: str) -> TrainingProbes:
        """What probes read at a stage's checkpoints."""
        run = self.run
        notes = [line for path in run.checkpoints(stage).values() for line in _notes(path / "probes")]
        return TrainingProbes(
            run.probes_over_training(stage),
            stage,
            run.probes_file(stage),
            run.losses_of(stage),
            [*dict.fromkeys(notes)],
        )

    @property
    def only_probed(self) -> bool:
        """Whether nothing was to be trained: a pre-trained LM and a corpus, which is what probes need."""
        return (
            self.run.config.lm.name is not None and set(self.stages) == {"lm", "corpus"} and self.has(PROBES)
        )

    @property
    def unfinished(self) -> list[str]:
        """The stages that are yet to come."""
        return [] if self.only_probed else [s for s in stages_of(self.run.config) if s not in self.stages]

    # Settings that results were made with, where these are not the run's

    @cached_property
    def replaced_in_evaluation(self) -> dict[str, Any]:
        """Settings of the evaluation, by dotted name."""
        used, own = self.run.evaluation()["settings"], evaluation_record(self.run.config)
        return {
            f"evaluation.{name}": used[name] for name in own if name != "split" and used[name] != own[name]
        }

    @cached_property
    def replaced_in_generation(self) -> dict[str, Any]:
        """Settings of the generation of text, by dotted name."""
        found, config = self.run.generation_metrics(), self.run.config
        own = config.generation.model_dump(mode="json")
        own["seeds"] = own["seeds"] or [config.seed]
        used: dict[str, Any] = found["settings"]
        if any("prompts in place of" in note for note in found["notes"]):
            own.pop("prompts")  # there were fewer documents than were asked for
        replaced = {f"generation.{name}": used[name] for name in own if used[name] != own[name]}
        resamples = used["resamples"]
        return (
            {} if resamples == config.evaluation.resamples else {"evaluation.resamples": resamples}
        ) | replaced

    @cached_property
    def replaced_in_probing(self) -> dict[str, Any]:
        """Settings of the probes, by dotted name, and all others that the run has changed since."""
        return self._changed(self.probe_record.config)

    def replaced_in(self, settings_file: str) -> dict[str, Any]:
        """The same of other results, of which a file tells all settings."""
        settings = read_json(self.run.folder / settings_file)
        return self._changed(
            Config.from_dict({k: v for k, v in settings.items() if k in Config.model_fields})
        )

    def _changed(self, used: Config) -> dict[str, Any]:
        both = (
            (name, setting_value(used, name), setting_value(self.run.config, name))
            for name in setting_names()
        )
        return {name: value for name, value, own in both if value != own}

    # Time

    def written(self, file: str) -> float:
        """When a file was written."""
        return (self.run.folder / file).stat().st_mtime

    def trained_later(self, file: str, stages: list[str]) -> list[str]:
        """Which of some stages were trained after a file of results was written.

        A copy has time stamps of its own. So a stage counts only if its files are newer by the time that
        its training took, at least; and not at all if they were taken from another run.
        """
        then = self.written(file)
        return [
            stage
            for stage in stages
            if stage in self.stages
            and "taken_from" not in self.stages[stage]
            and self._newest(stage) - then >= max(1.0, self.stages[stage].get("seconds", 0.0))
        ]

    def _newest(self, stage: str) -> float:
        # Checkpoints have results of their own, and none is newer than what the stage left at its end.
        kept = self.run.checkpoints_of(stage)
        left = [path for path in self.run.files_of(stage) if not path.is_relative_to(kept)]
        files = [file for path in left for file in _files_in(path)]
        return max((file.stat().st_mtime for file in files), default=0.0)


def _notes(folder: Path) -> list[str]:
    """Notes on a folder's results."""
    settings = folder / "settings.json"
    return read_json(settings).get("notes", []) if settings.is_file() else []


def _files_in(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def attempt(file: str, damaged: dict[str, str], work: Callable[[], T]) -> T | None:
    """What some work on a file returns; None where that is damaged.

    Args:
        file: The file's path in the run's folder.
        damaged: Gets a line that says so, one for each file.
        work: What reads it.
    """
    try:
        return work()
    except (ProbekitError, OSError) as error:
        damaged.setdefault(file, str(error))
    except UNFIT as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        damaged.setdefault(
            file, f"{file} does not hold what probekit writes ({reason}); what it tells is left out in part"
        )
    return None
