"""Sections of a report that tell what a run is: its parts, its training, its settings, how to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from probekit.data.corpus import action_table, sizes
from probekit.errors import ProbekitError
from probekit.models.depth_ensemble import MEMBERS
from probekit.models.mixing import VARIANTS
from probekit.reports.document import Block, Code, Fold, Paragraph, Picture, table
from probekit.reports.figures import svg_of
from probekit.reports.plots import plot_training
from probekit.reports.report_findings import (
    EVALUATION,
    GENERATION,
    INTERVENTIONS,
    PROBES,
    SUBNETWORKS,
    UNFIT,
    Findings,
)
from probekit.reports.terminal import DISPLAY_ACTIONS

COMMON_OPTIONS = ("device", "evaluation")
"""Sections of settings that all commands take that read a run; each has one of its own beside."""

LONGEST = 100
"""Characters of a sentence that are shown."""


def about(found: Findings) -> list[Block]:
    """The method, its models, what the corpus was made of."""
    return [Paragraph(_method(found)), table("The run", ["fact", "value"], _facts(found), words=2)]


def _method(found: Findings) -> str:
    config = found.run.config
    if found.only_probed:
        return f"The LM {config.lm.name} and a corpus, put together to be probed: nothing was trained."
    if config.method == "depth-ensemble":
        members = ", ".join(config.depth.members)
        return (
            f"A depth ensemble (arXiv 2410.13077): the logits of the last {config.depth.layers} layers, "
            f"weighed by a learned router for every token. Members: {members}."
        )
    return (
        "An LM conditioned on the action that is planned for its next sentence (arXiv 2410.12492, "
        f"2404.00614). Variants, by how the action is chosen: {', '.join(config.mixing.variants)}."
    )


def _facts(found: Findings) -> list[tuple[str, object]]:
    config, stages = found.run.config, found.stages
    lm = config.lm
    new = f"new: {lm.layers} layers, width {lm.width}, {lm.heads} heads, {lm.positions} positions"
    corpus = stages.get("corpus", {})
    source = config.corpus.reader + (f", {config.corpus.path}" if config.corpus.path else "")
    facts: list[tuple[str, object]] = [
        ("LM", new if lm.name is None else lm.name + (f", revision {lm.revision}" if lm.revision else "")),
        ("parameters of the LM", stages.get("lm", {}).get("parameters")),
        ("corpus", source),
        ("vocabulary", corpus.get("vocabulary")),
        ("actions", f"{config.actions.k:,}, labels: {config.actions.labels}"),
        ("sentence encoder", f"{config.actions.encoder}, {config.actions.dimensions} dimensions"),
        ("clusters against planted actions", _index(corpus.get("adjusted_rand_index"))),
        ("documents of one sentence", corpus.get("one_sentence_documents")),
        ("blank documents dropped", corpus.get("blank_documents_dropped")),
        ("fingerprint of the corpus", corpus.get("fingerprint")),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _index(value: float | None) -> str | None:
    return None if value is None else f"adjusted Rand index {value:.3f}"


def corpus(found: Findings) -> list[Block]:
    """Sizes of the corpus, and its actions."""
    corpus = found.run.corpus
    of_split = sizes(corpus)
    rows = [(name, *map(int, row)) for name, row in zip(of_split.index, of_split.to_numpy(), strict=True)]
    total = ("all", *map(int, of_split.sum()))
    actions = action_table(corpus, nearest=1)
    shown = [
        (str(action), int(row["sentences"]), f"{row['share']:.1%}", _clipped(row["nearest"]))
        for action, row in actions.head(DISPLAY_ACTIONS).iterrows()
    ]
    rarer = len(actions) - len(shown)
    caption = "Actions by training sentences, each with the sentence nearest to its embedding"
    caption += f"; {rarer:,} rarer ones are left out" if rarer > 0 else ""
    listed = [(action, nearest, sentences, share) for action, sentences, share, nearest in shown]
    columns = ["action", "nearest sentence", "sentences", "share"]
    return [
        table("The corpus by split", ["split", *of_split.columns], [*rows, total]),
        Fold("Actions", (table(caption, columns, listed, words=2),)),
    ]


def _clipped(texts: list[str]) -> str:
    text = texts[0] if texts else ""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def stages(found: Findings) -> list[Block]:
    """Finished stages, their times and what they left."""
    columns = {"parameters": "parameters", "precision": "precision", "taken_from": "taken from"}
    kept = [key for key in columns if any(key in facts for facts in found.stages.values())]
    rows = [
        (name, f"{facts['seconds']:,.1f}" if "seconds" in facts else "", *(facts.get(key) for key in kept))
        for name, facts in found.stages.items()
    ]
    total = sum(facts.get("seconds", 0.0) for facts in found.stages.values())
    caption = f"Finished stages, {total:,.0f} seconds in all; parameters are those that were trained"
    return [table(caption, ["stage", "seconds", *(columns[key] for key in kept)], rows)]


def training(found: Findings) -> list[Block]:
    """Losses of every stage, as curves and as the numbers at their ends."""
    rows = []
    for stage, own in found.run.metrics().groupby("stage", sort=False):
        losses = own[own.loss.notna()]
        # A mean over the last rows: a single one is a single batch.
        last = losses.loss.tail(max(1, len(losses) // 20)).mean()
        lowest = own.validation_loss.min() if "validation_loss" in own else np.nan
        rows.append((stage, int(own.step.max()), *map(_loss, (losses.loss.head(1).mean(), last, lowest))))
    caption = (
        "Losses in nats: the first, the mean of the last twentieth that was logged, on validation documents"
    )
    columns = ["stage", "steps", "first", "last", "lowest in validation"]
    numbers = table(caption, columns, rows)
    picture = Picture(
        "training",
        "Losses by step, moving averages over a twentieth of the logged rows; dots: on validation documents.",
        f"Training curves of {len(rows)} stages; the table below has their ends.",
        svg_of(plot_training(found.run)),
    )
    return [picture, numbers, *_other_losses(found)]


def _other_losses(found: Findings) -> list[Block]:
    """What is in training losses and in no validation loss."""
    parts = []
    if joint := [name for name in found.run.variants if VARIANTS[name].joint]:
        parts.append(f"that of {', '.join(joint)} has the planner's own loss in it")
    if distilled := [name for name in found.run.members if MEMBERS[name].distilled]:
        parts.append(f"that of {', '.join(distilled)} has the distillation's")
    if not parts:
        return []
    return [
        Paragraph(f"Validation losses of these are of tokens alone; of training losses, {', '.join(parts)}.")
    ]


def _loss(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else ""


def reproduction(found: Findings) -> list[Block]:
    """Commands that make the run again, and where it was made."""
    origin = found.provenance
    here = [
        ("begun", origin["begun"]),
        ("command", shlex.join(map(str, origin["command"]))),
        ("git commit", origin["git_commit"] or "not from a checkout"),
        *((f"seed ({name})", str(seed)) for name, seed in origin["seeds"].items()),
        ("device", origin["device"]),
        *((f"machine: {name}", str(value)) for name, value in origin["machine"].items()),
        *((name, str(version)) for name, version in origin["versions"].items()),
    ]
    return [
        Paragraph(
            "From the folder that the run is in, with the versions below. Its config.yaml is complete, seeds "
            "and all; the settings that are given beside it are those in which results differ from it."
        ),
        Code("\n".join(_commands(found, origin["git_commit"])), "sh"),
        table("Where it was made", ["fact", "value"], here, words=2),
    ]


def _commands(found: Findings, commit: str | None) -> list[str]:
    again, config = f"{found.name}-again", f"{found.name}/config.yaml"
    lines = [f"# probekit at commit {commit}"] if commit else []
    if found.only_probed:
        lines.append(shlex.join(_probe_model(found, config, again)))
        return [*lines, *_causal(found, again)]
    lines.append(shlex.join(["probekit", "train", "--config", config, "--out", again]))
    if found.has(EVALUATION) or found.has(GENERATION):
        words = ["probekit", "evaluate", again]
        words += ["--generation"] if found.has(GENERATION) else []
        words += _options({**_replaced(found, "evaluation"), **_replaced(found, "generation")})
        lines.append(shlex.join(words))
    if found.has(PROBES):
        kept = _of_sections(_replaced(found, "probing"), "probe")
        lines.append(shlex.join(["probekit", "probe", again, *_options(kept)]))
    return [*lines, *_checkpoints(found, again), *_causal(found, again)]


def _checkpoints(found: Findings, again: str) -> Iterator[str]:
    """The commands that probe checkpoints; without `probe.variants` what the stage trains is read."""
    for stage in found.probed_stages:
        kept = {}
        if checkpoints := found.run.checkpoints(stage):
            folder = checkpoints[max(checkpoints)].relative_to(found.run.folder).as_posix()
            kept = _of_sections(_replaced(found, f"{folder}/probes/settings.json"), "probe")
        if list(kept.get("probe.variants", ())) == ["none" if stage == "lm" else stage.split("/")[-1]]:
            del kept["probe.variants"]
        words = ["probekit", "probe", again, "--checkpoints", "--stage", stage]
        yield shlex.join([*words, *_options(kept)])


def _causal(found: Findings, again: str) -> Iterator[str]:
    """The commands that intervene and that find subnetworks, one for each variant."""
    for command, file in (("intervene", INTERVENTIONS), ("subnetwork", SUBNETWORKS)):
        for variant in found.variants_with(file):
            settings_file = file.format(variant).replace("results.parquet", "settings.json")
            kept = {f"{command}.variant": variant}
            kept |= _of_sections(_replaced(found, settings_file), command)
            yield shlex.join(["probekit", command, again, *_options(kept)])


def _of_sections(settings: Mapping[str, Any], own: str) -> dict[str, Any]:
    """The settings that a command takes."""
    return {k: v for k, v in settings.items() if k.split(".")[0] in (*COMMON_OPTIONS, own)}


def _probe_model(found: Findings, config: str, again: str) -> list[str]:
    model = str(found.run.config.lm.name)
    return [
        *("probekit", "probe", "--model", model, "--config", config, "--out", again),
        *_options(_replaced(found, "probing")),
    ]


def _replaced(found: Findings, what: str) -> Mapping[str, Any]:
    """Settings that were not the run's; none where the file that tells them is damaged (told elsewhere)."""
    try:
        return found.replaced_in(what) if what.endswith(".json") else getattr(found, f"replaced_in_{what}")
    except (ProbekitError, OSError, *UNFIT):
        return {}


def _options(settings: Mapping[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", *_words(value))]


def _words(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [word for one in value for word in _words(one)]
    return [str(value).lower() if isinstance(value, bool | None) else str(value)]


def settings(found: Findings) -> list[Block]:
    """All settings."""
    return [Fold("config.yaml", (Code(found.run.config.to_yaml(), "yaml"),))]
