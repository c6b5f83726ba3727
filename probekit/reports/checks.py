"""What to mind before the results of a run are believed: one check for each thing that goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from probekit.data.corpus import FEW_DOCUMENTS, MORE_DOCUMENTS, too_few
from probekit.models.mixing import VARIANTS
from probekit.reports import intervention_tables, subnetwork_tables
from probekit.reports.report_causal import compared
from probekit.reports.report_findings import (
    CORPUS,
    EVALUATION,
    GENERATION,
    INTERVENTIONS,
    METRICS,
    PROBE_SETTINGS,
    PROBES,
    PROVENANCE,
    SUBNETWORKS,
    Findings,
    attempt,
)
from probekit.reports.terminal import best_by_step, unreliable_cells
from probekit.run.provenance import installed_versions

Check = Callable[[Findings], Iterator[str]]

CEILING = "ceiling (words)"
"""What no planner can beat: it reads the sentences before, and so does the ceiling."""

BETTER = {"accuracy": 1, "top5": 1, "cross_entropy": -1}
"""Metrics of planners, and whether more or less of it is better."""


def cautions_of(found: Findings, damaged: dict[str, str]) -> list[str]:
    """What to mind of a run.

    Args:
        found: What was found.
        damaged: Gets a line for each file that cannot be read.
    """
    told: list[str] = []
    for file, check in (*CHECKS, *_of_each(found)):
        if found.has(file):
            told += attempt(file, damaged, partial(list[str], check(found))) or []
    return list(dict.fromkeys(told))


def unfinished(found: Findings) -> Iterator[str]:
    """Stages of the settings that are not there."""
    if found.unfinished:
        yield (
            f"The run is not finished: {', '.join(found.unfinished)} is yet to come; "
            f"`probekit train --resume --out {found.name}` goes on"
        )


def few_documents(found: Findings) -> Iterator[str]:
    """A corpus with few test documents."""
    if line := too_few(len(found.run.corpus.documents("test"))):
        yield line


def few_prompts(found: Findings) -> Iterator[str]:
    """Generated text from few documents."""
    prompts = found.generation["settings"]["prompts"]
    if prompts < FEW_DOCUMENTS:
        yield f"Generated text goes on with {prompts:,} documents only: its intervals are too narrow to trust"


def not_finite(found: Findings) -> Iterator[str]:
    """Losses that are no numbers."""
    rows = found.run.metrics()
    kinds = {"loss": "training", "validation_loss": "validation"}
    for column in (name for name in kinds if name in rows):
        # A row of one kind has no entry of the other: pandas sees both as NaN.
        of_kind = rows[rows.epoch.notna() == (column == "validation_loss")] if "epoch" in rows else rows
        bad = of_kind[~np.isfinite(of_kind[column].astype(float))]
        for stage, own in bad.groupby("stage", sort=False):
            yield (
                f"{len(own):,} {kinds[column]} losses of the stage {stage} are not finite, the first at step "
                f"{int(own.step.min()):,}: what was trained there is not to be trusted"
            )


def other_versions(found: Findings) -> Iterator[str]:
    """Packages of other versions than the run was begun with."""
    here = installed_versions()
    recorded: dict[str, Any] = found.provenance["versions"]
    other = [
        f"{name} {was} (now {here[name]})" for name, was in recorded.items() if here.get(name, was) != was
    ]
    if other:
        yield (
            f"The run was begun with other versions than those that are installed now: {', '.join(other)}; "
            "numbers of a repetition may differ"
        )


def replaced(what: str, settings: Callable[[Findings], Mapping[str, Any]]) -> Check:
    """A check for results with other settings than the run's."""

    def check(found: Findings) -> Iterator[str]:
        if changed := settings(found):
            shown = ", ".join(f"{name} {_value(value)}" for name, value in changed.items())
            yield f"{what} with other settings than the run's: {shown}"

    return check


def outdated_evaluation(found: Findings) -> Iterator[str]:
    """An evaluation made before a later training, or without what was trained later."""
    yield from _outdated(found, EVALUATION, [*found.stages], f"probekit evaluate {found.name}")
    table = found.evaluation["perplexity"]
    run = found.run
    trained = run.members if run.config.method == "depth-ensemble" else run.variants
    if missing := [name for name in trained if name not in set(table.variant)]:
        yield f"{EVALUATION} lacks what was trained later: {', '.join(missing)}"


def outdated_generation(found: Findings) -> Iterator[str]:
    """Generated text of models that were trained again."""
    stages = [stage for stage in found.stages if not stage.startswith("depth/")]
    yield from _outdated(found, GENERATION, stages, f"probekit evaluate {found.name} --generation")


def outdated_probes(found: Findings) -> Iterator[str]:
    """Probes of models that were trained again."""
    stages = _read_stages(found.probes.table.variant.dropna().unique())
    yield from _outdated(found, PROBES, stages, f"probekit probe {found.name}")


def interventions(found: Findings, variant: str) -> Iterator[str]:
    """Interventions before a later training, or in few documents."""
    command = f"probekit intervene {found.name} --intervene.variant {variant}"
    yield from _outdated(found, INTERVENTIONS.format(variant), _read_stages([variant]), command)
    rows = compared(found.interventions(variant).table)
    for kind, own in rows.groupby("kind", sort=False):
        what = f"Interventions in {variant} ({kind})"
        yield from _few(what, int(own.documents.min()), intervention_tables.REMEDY)


def subnetwork(found: Findings, variant: str) -> Iterator[str]:
    """A subnetwork from before a later training, or measured on few documents."""
    command = f"probekit subnetwork {found.name} --subnetwork.variant {variant}"
    yield from _outdated(found, SUBNETWORKS.format(variant), _read_stages([variant]), command)
    documents = int(found.subnetwork(variant).table.documents.max())
    yield from _few(f"The subnetwork of {variant}", documents, subnetwork_tables.REMEDY)


def over_training(found: Findings, stage: str) -> Iterator[str]:
    """Probes of checkpoints without those that were kept later, before a later training, of few documents."""
    file, command = (
        found.over_training_file(stage),
        f"probekit probe {found.name} --checkpoints --stage {stage}",
    )
    rows = found.over_training(stage).table
    yield from _outdated(found, file, ["corpus", stage], command)
    if missing := sorted({*found.run.checkpoints(stage)} - {*rows.step}):
        steps = ", ".join(f"{step:,}" for step in missing)
        yield f"{file} lacks checkpoints that were kept later, of steps {steps}; run `{command}` again"
    documents = int(best_by_step(rows).documents.max())
    yield from _few(f"Probes over the training of {stage}", documents, MORE_DOCUMENTS)


def _of_each(found: Findings) -> Iterator[tuple[str, Check]]:
    """Checks of single variants and stages."""
    for stage in found.probed_stages:
        yield found.over_training_file(stage), partial(over_training, stage=stage)
    for file, check in ((INTERVENTIONS, interventions), (SUBNETWORKS, subnetwork)):
        for variant in found.variants_with(file):
            yield file.format(variant), partial(check, variant=variant)


def _read_stages(variants: Iterable[str]) -> list[str]:
    """The stages whose models are read where variants are."""
    own = [name for name in variants if name in VARIANTS]
    return ["corpus", "lm", *(["planner"] if own else []), *(f"adapter/{name}" for name in own)]


def _few(what: str, documents: int, remedy: str) -> Iterator[str]:
    if line := too_few(documents, remedy):
        yield f"{what}: {line[0].lower()}{line[1:]}"


def cells(found: Findings) -> Iterator[str]:
    """Cells that are empty, constant or have not converged."""
    probes = _probes(found)
    yield from (f"Probes: {line}" for line in unreliable_cells(probes))
    if len(tested := probes.documents.dropna()) and tested.max() < FEW_DOCUMENTS:
        yield str(too_few(int(tested.max())))  # told once where the corpus has no more


def injected_cells(found: Findings) -> Iterator[str]:
    """Cells that were told what they are asked."""
    probes = _probes(found)
    if told := int(probes.injected.sum()):
        names = ", ".join(probes[probes.injected].variant.unique())
        yield (
            f"{told:,} of {len(probes):,} cells read the target's own action because a variant had added it "
            f"there ({names}): they carry a star, are compared with nothing and are never the best cell"
        )


def probes_above_ceiling(found: Findings) -> Iterator[str]:
    """Cells that read more than anyone can."""
    probes = _probes(found)
    above = probes[(probes.shortfall_high < 0) & ~probes.injected]
    if len(above):
        worst = above.sort_values("shortfall_high").iloc[0]
        yield (
            f"{len(above):,} of {len(probes):,} probes are above the ceiling by more than their intervals, "
            f"the most {worst.variant}, {worst.location}, layer {worst.layer}, distance {worst.distance}, "
            f"horizon {worst.horizon}: by {-worst.shortfall:.3f} bits. That is a leak until shown otherwise"
        )


def planners_above_ceiling(found: Findings) -> Iterator[str]:
    """Planners that plan better than anyone can."""
    table = found.evaluation["planner"] if "planner" in found.evaluation else pd.DataFrame()
    if table.empty:
        return
    ceilings = dict(table[table.reader == CEILING][["metric", "value"]].to_numpy())
    for row in table[table.reader.str.startswith("planner")].to_dict("records"):
        metric, better = row["metric"], BETTER.get(row["metric"], 0)
        nearest = row["value_low"] if better > 0 else row["value_high"]
        if metric in ceilings and better * (nearest - ceilings[metric]) > 0:
            yield (
                f"{row['reader']} is above the ceiling by more than its interval: {metric} {row['value']:.3f}"
                f", where {ceilings[metric]:.3f} is the best possible. That is a leak until shown otherwise"
            )


CHECKS: tuple[tuple[str, Check], ...] = (
    ("run.json", unfinished),
    (CORPUS, few_documents),
    (METRICS, not_finite),
    (EVALUATION, planners_above_ceiling),
    (PROBES, probes_above_ceiling),
    (EVALUATION, outdated_evaluation),
    (GENERATION, outdated_generation),
    (PROBES, outdated_probes),
    (EVALUATION, replaced("Evaluated", lambda found: found.replaced_in_evaluation)),
    (GENERATION, replaced("Generated", lambda found: found.replaced_in_generation)),
    (PROBE_SETTINGS, replaced("Probed", lambda found: found.replaced_in_probing)),
    (PROBES, cells),
    (PROBES, injected_cells),
    (GENERATION, few_prompts),
    (PROVENANCE, other_versions),
)
"""All checks, what is worst first, and the files that they read."""


def _outdated(found: Findings, file: str, stages: list[str], command: str) -> Iterator[str]:
    if later := found.trained_later(file, stages):
        yield f"{file} is older than {', '.join(later)}: it tells of what was before; run `{command}` again"


def _probes(found: Findings) -> pd.DataFrame:
    table = found.probes.table
    return table[table.reader == "probe"]


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "unset" if value is None else str(value)
