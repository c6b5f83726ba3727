"""What speaks against the results of a run: one check for each thing that goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from probekit.config import Config, setting_names, setting_value
from probekit.data.corpus import FEW_DOCUMENTS, MORE_DOCUMENTS, too_few, too_few_tested
from probekit.evaluation.perplexity import evaluation_record
from probekit.io import read_json
from probekit.models.mixing import VARIANTS
from probekit.probing.probe import defaults_of
from probekit.probing.record import SETTINGS, ProbeRecord
from probekit.probing.transfer import TRANSFER
from probekit.reports.display import described, number
from probekit.reports.tables import (
    MORE_BOUNDARIES,
    MORE_CONTINUED,
    MORE_SUBNETWORK_DOCUMENTS,
    baseline_notes,
    best_by_step,
    better_than_baselines,
    probe_notes,
    unreliable_probes,
)
from probekit.run.folder import installed_versions
from probekit.run.run import Run
from probekit.run.stages import stages_of

EVALUATION, GENERATION, PROBES = "evaluation.json", "generation.json", "probes/results.parquet"

PROBE_SETTINGS = f"probes/{SETTINGS}"
CONTINUATION = "continuation/results.parquet"
GEOMETRY_FILE = "probes/geometry.parquet"
TRANSFER_FILE = f"probes/{TRANSFER}"

WORDS_CEILING = "ceiling (words)"
"""What no planner can beat: it reads the sentences before, and so does the ceiling."""

LEAK = "That is a leak until shown otherwise"


def checks(run: Run) -> list[str]:
    """A line for each thing that speaks against a run's results, the worst first."""
    return list(dict.fromkeys(line for check in CHECKS for line in check(run)))


# What a run has


class Result(NamedTuple):
    """A file of results, the stages whose models were measured, and the command that makes it."""

    file: str
    stages: list[str]
    command: str


def results_of(run: Run) -> Iterator[Result]:
    """Every file of results that a run has."""
    name, stages = run_name(run), list(run.stages)
    if has(run, EVALUATION):
        yield Result(EVALUATION, stages, f"probekit evaluate {name}")
    if has(run, GENERATION):
        written = [stage for stage in stages if not stage.startswith("depth/")]
        yield Result(GENERATION, written, f"probekit evaluate {name} --generation")
    if has(run, PROBES):
        variants = run.probes().variant.dropna().unique()
        yield Result(PROBES, _stages_read(variants), f"probekit probe {name}")
    for stage in probed_stages(run):
        file = run.probes_file(stage).relative_to(run.folder).as_posix()
        yield Result(file, ["corpus", stage], f"probekit probe {name} --checkpoints --stage {stage}")
    if has(run, CONTINUATION):
        yield Result(CONTINUATION, _stages_read(["none"]), f"probekit continuation {name}")
    for kind, command in (("interventions", "intervene"), ("subnetworks", "subnetwork")):
        for variant in variants_with(run, kind):
            words = f"probekit {command} {name} --{command}.variant {variant}"
            yield Result(f"{kind}/{variant}/results.parquet", _stages_read([variant]), words)


def has(run: Run, file: str) -> bool:
    """Whether the run's folder holds a file."""
    return (run.folder / file).is_file()


def run_name(run: Run) -> str:
    """The name of the run's folder."""
    return run.folder.resolve().name


def only_probed(run: Run) -> bool:
    """Whether nothing was to be trained: a pre-trained LM and a corpus, put together to be probed."""
    probed = has(run, PROBES) or bool(probed_stages(run))
    return run.config.lm.name is not None and set(run.stages) == {"lm", "corpus"} and probed


def variants_with(run: Run, kind: str) -> list[str]:
    """Variants with results of `interventions` or `subnetworks`."""
    return [name for name in ("none", *VARIANTS) if has(run, f"{kind}/{name}/results.parquet")]


def probed_stages(run: Run) -> list[str]:
    """Stages whose checkpoints were probed."""
    return [stage for stage in stages_of(run.config) if run.probes_file(stage).is_file()]


def changed_settings(run: Run, file: str) -> dict[str, Any]:
    """The settings with which results were made, by dotted name, where the run's are different.

    Args:
        run: The run.
        file: evaluation.json, generation.json, or the settings.json of other results.
    """
    if not has(run, file):
        return {}
    record, config = read_json(run.folder / file), run.config
    if file == EVALUATION:
        own = {f"evaluation.{name}": value for name, value in evaluation_record(config).items()}
    elif file == GENERATION:
        generation = config.generation.model_dump(mode="json")
        generation["seeds"] = generation["seeds"] or [config.seed]
        if any("prompts in place of" in note for note in record["notes"]):
            del generation["prompts"]  # there were fewer documents than were asked for
        own = {"evaluation.resamples": config.evaluation.resamples}
        own |= {f"generation.{name}": value for name, value in generation.items()}
    else:
        made_with = Config.from_dict({k: v for k, v in record.items() if k in Config.model_fields})
        if file.endswith(PROBE_SETTINGS):
            config = config.override(defaults_of(ProbeRecord.of(record).kind, config.probe))
        used = {name: setting_value(made_with, name) for name in setting_names()}
        return {name: value for name, value in used.items() if value != setting_value(config, name)}
    used = record["settings"]
    keys = {name: name.split(".")[1] for name in own}
    return {name: used[key] for name, key in keys.items() if key in used and used[key] != own[name]}


def setting_words(value: Any) -> list[str]:
    """A setting's value as words of a command line."""
    if isinstance(value, list | tuple):
        return [word for one in value for word in setting_words(one)]
    if value is None:
        return ["null"]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def _stages_read(variants: Iterable[str]) -> list[str]:
    """The stages whose models are read where variants are probed or changed."""
    own = [name for name in variants if name in VARIANTS]
    return ["corpus", "lm", *(["planner"] if own else []), *(f"adapter/{name}" for name in own)]


def _probes(run: Run) -> pd.DataFrame:
    """The rows of probes, without baselines; empty where the run is not probed."""
    if not has(run, PROBES):
        return pd.DataFrame()
    table = run.probes()
    return table[table.reader == "probe"]


# The checks


def unfinished(run: Run) -> Iterator[str]:
    """Stages that the settings ask for and that are not trained."""
    finished = run.stages
    missing = [stage for stage in stages_of(run.config) if stage not in finished]
    if missing and not only_probed(run):
        yield (
            f"The run is not finished: {', '.join(missing)} not trained; `probekit train --resume --out "
            f"{run_name(run)}` goes on"
        )


def few_documents(run: Run) -> Iterator[str]:
    """Intervals from resampling few documents."""
    if has(run, "corpus/facts.json") and (line := too_few_tested(run.corpus)):
        yield line
    counted = []
    if has(run, PROBES) and len(tested := _probes(run).groups.dropna()):
        counted.append(("", tested.max(), MORE_DOCUMENTS))
    for stage in probed_stages(run):
        documents = best_by_step(run.probes_over_training(stage)).groups.max()
        counted.append((f"Probes over the training of {stage}", documents, MORE_DOCUMENTS))
    if variants_with(run, "interventions"):
        for (variant, kind), own in compared_interventions(run).groupby(["variant", "kind"], sort=False):
            counted.append((f"Interventions in {variant} ({kind})", own.documents.min(), MORE_BOUNDARIES))
    if variants_with(run, "subnetworks"):
        for variant, own in run.subnetworks().groupby("variant", sort=False):
            counted.append((f"The subnetwork of {variant!s}", own.documents.max(), MORE_SUBNETWORK_DOCUMENTS))
    for what, documents, remedy in counted:
        if line := too_few(int(documents), remedy):
            yield f"{what}: {line[0].lower()}{line[1:]}" if what else line


def few_continued(run: Run) -> Iterator[str]:
    """Few documents in which the LM wrote on."""
    documents = run.continuation().documents.max() if has(run, CONTINUATION) else FEW_DOCUMENTS
    if line := too_few(int(documents), MORE_CONTINUED):
        yield f"Continuation: {line[0].lower()}{line[1:]}"


def compared_interventions(run: Run) -> pd.DataFrame:
    """Rows of the interventions that are compared with random ones."""
    table = run.interventions()
    return table.merge(
        table[table.metric == "next_loss_over_random"][["variant", "kind", "condition"]].drop_duplicates()
    )


def not_finite(run: Run) -> Iterator[str]:
    """Losses that are no numbers."""
    rows = run.metrics() if has(run, "metrics.jsonl") else pd.DataFrame()
    for column, kind in (("loss", "training"), ("validation_loss", "validation")):
        if column not in rows:
            continue
        # A row of training has no entry of validation, nor the reverse: pandas shows both as NaN.
        of_kind = rows[rows.epoch.notna() == (kind == "validation")] if "epoch" in rows else rows
        bad = of_kind[~np.isfinite(of_kind[column].astype(float))]
        for stage, own in bad.groupby("stage", sort=False):
            yield (
                f"{len(own):,} {kind} losses of the stage {stage} are not finite, the first at step "
                f"{int(own.step.min()):,}: do not trust what was trained there"
            )


def planners_above_ceiling(run: Run) -> Iterator[str]:
    """Planners that plan better than is possible."""
    table = pd.DataFrame(run.evaluation().get("planner", ())) if has(run, EVALUATION) else pd.DataFrame()
    if table.empty:
        return
    ceilings = dict(table[table.reader == WORDS_CEILING][["metric", "value"]].to_numpy())
    for row in table[table.reader.str.startswith("planner")].to_dict("records"):
        metric, better = row["metric"], described(row["metric"]).better
        nearest = row["value_low"] if better > 0 else row["value_high"]
        if metric in ceilings and better * (nearest - ceilings[metric]) > 0:
            yield (
                f"{row['reader']} is above the ceiling by more than its interval: {metric} "
                f"{number(row['value'])}, where {number(ceilings[metric])} is the best possible. {LEAK}"
            )


def probes_above_ceiling(run: Run) -> Iterator[str]:
    """Probes that read more than is possible."""
    if (probes := _probes(run)).empty:
        return
    above = probes[(probes.shortfall_high < 0) & ~probes.injected]
    if len(above):
        worst = above.sort_values("shortfall_high").iloc[0]
        yield (
            f"{len(above):,} of {len(probes):,} probes are above the ceiling by more than their intervals, "
            f"the most {worst.variant}, {worst.location}, layer {worst.layer}, position {worst.position}, "
            f"horizon {worst.horizon}: by {number(-worst.shortfall)} bits. {LEAK}"
        )


def outdated(run: Run) -> Iterator[str]:
    """Results of models that were trained again later."""
    stages = run.stages
    for file, read, command in results_of(run):
        written = (run.folder / file).stat().st_mtime
        # A copied folder has time stamps of its own: a stage counts as later only if it is so by the
        # time that its training took, and not at all if it was taken from another run.
        later = [
            stage
            for stage in read
            if stage in stages
            and "taken_from" not in stages[stage]
            and _trained_at(run, stage) - written >= max(1.0, stages[stage].get("seconds", 0.0))
        ]
        if later:
            yield f"{file} is older than {', '.join(later)}, and out of date; run `{command}` again"


def _trained_at(run: Run, stage: str) -> float:
    """When the newest file of a stage was written, its checkpoints aside."""
    left = [path for path in run.files_of(stage) if not path.is_relative_to(run.checkpoints_of(stage))]
    files: list[Path] = [file for path in left for file in (path.rglob("*") if path.is_dir() else [path])]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def trained_later(run: Run) -> Iterator[str]:
    """Models and checkpoints that are not among the results because they were trained later."""
    if has(run, EVALUATION):
        evaluated = {row["variant"] for row in run.evaluation()["perplexity"]}
        trained = run.members if run.config.method == "depth-ensemble" else run.variants
        if missing := [name for name in trained if name not in evaluated]:
            yield f"{EVALUATION} lacks what was trained later: {', '.join(missing)}"
    for file, (_, *stages), command in results_of(run):
        if "--checkpoints" in command:
            probed = run.probes_over_training(stages[0]).step
            if missing_steps := sorted({*run.checkpoints(stages[0])} - {*probed}):
                steps = ", ".join(f"{step:,}" for step in missing_steps)
                yield f"{file} lacks checkpoints kept later, of steps {steps}; run `{command}` again"


def other_settings(run: Run) -> Iterator[str]:
    """Results that were made with other settings than the run's."""
    for made, file in (
        ("Evaluated", EVALUATION),
        ("Generated", GENERATION),
        ("Probed", PROBE_SETTINGS),
    ):
        if changed := changed_settings(run, file):
            shown = (
                f"{name} {'unset' if v is None else ' '.join(setting_words(v))}"
                for name, v in changed.items()
            )
            yield f"{made} with other settings than the run's: {', '.join(shown)}"


def unreliable_cells(run: Run) -> Iterator[str]:
    """Cells that are empty, constant or have not converged."""
    if len(probes := _probes(run)):
        yield from (f"Probes: {line}" for line in unreliable_probes(probes))


def doubtful_probes(run: Run) -> Iterator[str]:
    """What makes probes say little: labels, few examples, and baselines that read as much."""
    if (probes := _probes(run)).empty:
        return
    compared = probes[probes.gain_low.notna() & ~probes.injected & (probes.variant != "random")]
    lines: list[str] = []
    if len(compared) and not better_than_baselines(compared).any():
        lines += probe_notes(compared)
    lines += [*baseline_notes(run.probes()), *read_json(run.folder / PROBE_SETTINGS)["cautions"]]
    yield from (f"Probes: {line}" for line in lines)


def injected_cells(run: Run) -> Iterator[str]:
    """Cells whose activations hold the answer because the adapter added it."""
    probes = _probes(run)
    if len(probes) and (injected := int(probes.injected.sum())):
        names = ", ".join(probes[probes.injected].variant.unique())
        yield (
            f"{injected:,} of {len(probes):,} cells read the target's own action because a variant had "
            f"added it there ({names}): they carry a star, are compared with nothing and are never the best "
            "cell"
        )


def few_prompts(run: Run) -> Iterator[str]:
    """Generated text from few documents."""
    prompts = run.generation_metrics()["settings"]["prompts"] if has(run, GENERATION) else FEW_DOCUMENTS
    if prompts < FEW_DOCUMENTS:
        yield f"Generated text continues {prompts:,} documents only: its intervals are too narrow to trust"


def other_versions(run: Run) -> Iterator[str]:
    """Packages of other versions than the run was begun with."""
    if not has(run, "provenance.json"):
        return
    now = installed_versions()
    recorded = read_json(run.folder / "provenance.json")["versions"]
    changed = [
        f"{name} {was} (now {now[name]})" for name, was in recorded.items() if now.get(name, was) != was
    ]
    if changed:
        yield (
            f"The run was begun with other versions than are installed now: {', '.join(changed)}; numbers "
            "of a repetition may differ"
        )


CHECKS: tuple[Callable[[Run], Iterator[str]], ...] = (
    unfinished,
    few_documents,
    few_continued,
    not_finite,
    planners_above_ceiling,
    probes_above_ceiling,
    outdated,
    trained_later,
    other_settings,
    unreliable_cells,
    doubtful_probes,
    injected_cells,
    few_prompts,
    other_versions,
)
