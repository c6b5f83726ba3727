"""`probekit report`: all of a run on one page, what speaks against it at the top, as HTML and as Markdown.

A jinja2 template for each is filled with the same sections. The HTML page holds its pictures, and needs no
script and no network.
"""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape

from probekit.config import user_path
from probekit.errors import ProbekitError
from probekit.io import atomic_path, read_json, write_text
from probekit.models.depth_ensemble import MEMBERS
from probekit.models.locations import label
from probekit.models.mixing import VARIANTS
from probekit.models.revisions import name_of
from probekit.probing.geometry import geometry_notes
from probekit.probing.probe import ProbeResults
from probekit.probing.results import main_metric
from probekit.reports import tables, tables_compare
from probekit.reports.checks import (
    CONTINUATION,
    EVALUATION,
    GENERATION,
    GEOMETRY_FILE,
    PROBES,
    TRANSFER_FILE,
    changed_settings,
    checks,
    compared_interventions,
    has,
    only_probed,
    probed_stages,
    run_name,
    setting_words,
    variants_with,
)
from probekit.reports.display import INTERVALS, Table, described, display, number, visible
from probekit.reports.drawing import svg_of
from probekit.reports.plot_geometry import plot_geometry
from probekit.reports.plot_over_training import plot_over_training
from probekit.reports.plot_probes import PREFERRED, panels, plot_curve, plot_probes, probed_variants
from probekit.reports.plot_runs import plot_perplexity, plot_training
from probekit.reports.plot_transfer import draw_transfer
from probekit.run.run import Run

SUFFIXES = (".html", ".md")
"""What a report can be written as."""

UNFOLDED = 2
"""Locations whose pictures are shown at once; more are folded."""


class Picture(NamedTuple):
    """A picture: part of its file's name, its caption, a text in its place, and whether it is folded."""

    name: str
    caption: str
    alt: str
    svg: bytes
    folded: bool = False


class Section(NamedTuple):
    """A heading and what stands below it, in this order."""

    title: str
    text: str = ""
    code: str = ""
    language: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


def report(run: Run | str | Path, out: str | Path | None = None) -> list[Path]:
    """Writes a run's report.

    Args:
        run: The run or its folder.
        out: The file, ending in .html or .md; the pictures of Markdown go into `figures/` beside it. None:
            `report.html` and `report.md` in the run's folder.

    Returns:
        The files, without the pictures.

    Raises:
        ProbekitError: There is no run, a file in it is damaged, or the suffix is another one.
    """
    if out is not None and user_path(out).suffix not in SUFFIXES:
        raise ProbekitError(f"-o is {str(out)!r}; it must end in {' or '.join(SUFFIXES)}")
    run = Run.at(run)
    title, lines = f"Report on {run_name(run)}", checks(run)
    sections = [section for make in SECTIONS for section in make(run)]
    files = [user_path(out)] if out is not None else [run.folder / f"report{suffix}" for suffix in SUFFIXES]
    for file in files:
        if file.suffix == ".md":
            for picture in (picture for section in sections for picture in section.pictures):
                with atomic_path(file.parent / picture_path(file, picture)) as temporary:
                    temporary.write_bytes(picture.svg)
        write_text(file, render(title, lines, sections, file))
    return files


def render(title: str, lines: Sequence[str], sections: Sequence[Section], file: Path) -> str:
    """The text of a report.

    Args:
        title: Its heading.
        lines: What speaks against the tables.
        sections: All else.
        file: Where it is to be written; its suffix chooses the template.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),  # Markdown has a filter of its own
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "anchor": lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"),
        "base64": lambda data: base64.b64encode(data).decode("ascii"),
        "fence": lambda code: "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0)),
        "markdown": to_markdown,
        "path": lambda picture: quote(picture_path(file, picture)),
    }
    template = environment.get_template(f"report{file.suffix}.j2")
    return template.render(title=title, lines=lines, sections=sections)


def picture_path(file: Path, picture: Picture) -> str:
    """Where a picture of a Markdown report is, from the folder that holds the report."""
    return f"figures/{file.stem}_{picture.name}.svg"


MARKDOWN = re.compile(
    r"[\\`*|~#$]"  # code, emphasis, cells, strikethrough, headings, formulas
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis; inside a word it is a letter
    r"|!(?=\[)|\](?=[(\[:])"  # pictures, links and their definitions
)
"""What means something anywhere in a line of Markdown."""

LINE_START = re.compile(r"^([-+=]|\d+[.)])(?=[-=\s]|$)")
"""What means something at the beginning of one."""


def to_markdown(text: str, *, brackets: bool = False) -> str:
    """Plain text as Markdown that shows it, on one line.

    Args:
        text: The text.
        brackets: Whether it stands between brackets, where these mean something too.
    """
    line = visible(re.sub(r"[ \t\r\n]+", " ", text).strip())
    special = re.compile(rf"[\[\]]|{MARKDOWN.pattern}") if brackets else MARKDOWN
    line = special.sub(lambda found: f"\\{found[0]}", line)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return LINE_START.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", line)


# What the run is


def about(run: Run) -> Iterator[Section]:
    """The method, its models, what the corpus was made of."""
    config, facts = run.config, run.stages
    if only_probed(run):
        text = f"The LM {config.lm.name} and a corpus, put together to be probed: nothing was trained."
    elif config.method == "depth-ensemble":
        text = (
            f"A depth ensemble (arXiv 2410.13077): the logits of the last {config.depth.layers} layers, "
            f"weighed by a learned router for every token. Members: {', '.join(config.depth.members)}."
        )
    else:
        text = (
            "An LM conditioned on the action that is planned for its next sentence (arXiv 2410.12492, "
            f"2404.00614). Variants, by how the action is chosen: {', '.join(config.mixing.variants)}."
        )
    lm, corpus = config.lm, facts.get("corpus", {})
    new = f"new: {lm.layers} layers, width {lm.width}, {lm.heads} heads, {lm.positions} positions"
    index, with_actions = corpus.get("adjusted_rand_index"), config.actions.labels != "none"
    rows = {
        "LM": new if lm.name is None else lm.name + (f", revision {lm.revision}" if lm.revision else ""),
        "parameters of the LM": facts.get("lm", {}).get("parameters"),
        "corpus": config.corpus.reader + (f", {config.corpus.path}" if config.corpus.path else ""),
        "vocabulary": corpus.get("vocabulary"),
        "actions": f"{config.actions.k:,}, labels: {config.actions.labels}" if with_actions else None,
        "sentence encoder": (
            f"{config.actions.encoder}, {config.actions.dimensions} dimensions" if with_actions else None
        ),
        "clusters against planted actions": None if index is None else f"adjusted Rand index {number(index)}",
        "documents": corpus.get("documents"),
        "groups of documents": corpus.get("groups"),
        "documents of one sentence": corpus.get("one_sentence_documents"),
        "blank documents dropped": corpus.get("blank_documents_dropped"),
        "fingerprint of the corpus": corpus.get("fingerprint"),
    }
    yield Section("What it is", text, tables=[_facts("The run", rows)])


def _facts(caption: str, facts: dict[str, Any]) -> Table:
    table = pd.DataFrame([(name, value) for name, value in facts.items() if value is not None], dtype=object)
    return display(caption, table.set_axis(["fact", "value"], axis=1), ["fact", "value"])


def corpus(run: Run) -> Iterator[Section]:
    """Sizes of the corpus, and its actions."""
    if has(run, "corpus/facts.json"):
        yield Section("Corpus", tables=tables.corpus_tables(run.corpus))


# What was found


def evaluation(run: Run) -> Iterator[Section]:
    """Perplexity, planners beside baselines and ceilings, and multiple choice."""
    if not has(run, EVALUATION):
        return
    found = {name: pd.DataFrame(rows) for name, rows in run.evaluation().items() if name != "settings"}
    perplexity = found["perplexity"]
    best = perplexity.sort_values("perplexity").iloc[0]
    picture = Picture(
        "perplexity",
        f"Perplexity per token of {int(perplexity.documents.iloc[0]):,} test documents; lower is better.",
        f"Perplexity of {len(perplexity)} models with intervals; the lowest is {number(best.perplexity)}, of "
        f"{best.variant}. The table below has all.",
        svg_of(plot_perplexity(run)),
    )
    shown = tables.perplexity_tables(perplexity, found["differences"])
    yield Section("Perplexity", pictures=[picture], tables=shown)
    if len(planner := found.get("planner", pd.DataFrame())):
        text = (
            "A ceiling is the exact posterior of the planted corpus, given the words of all sentences "
            "before, or their true actions: no reader of these can do better."
        )
        ceiling = planner.reader.str.startswith("ceiling").any()
        yield Section("Planners", text if ceiling else "", tables=[tables.planner_table(planner)])
    if len(accuracy := found.get("accuracy", pd.DataFrame())):
        shown = tables.choice_tables(accuracy, found["accuracy_differences"])
        yield Section("Multiple choice", tables=shown)


def generation(run: Run) -> Iterator[Section]:
    """Metrics of generated text."""
    if has(run, GENERATION):
        found = run.generation_metrics()
        metrics = pd.DataFrame(found["metrics"]).astype({"value": float})
        notes = [*tables.generation_notes(metrics), *found["notes"]]
        yield Section("Generated text", tables=tables.generation_tables(metrics), notes=notes)


def probes(run: Run) -> Iterator[Section]:
    """The best cells beside what they have to beat, pictures of all, and what to know of them."""
    if not has(run, PROBES):
        return
    table = run.probes()
    cells = table[table.reader == "probe"]
    examples = int(table.examples[table[main_metric(table)].notna()].max())
    yield Section(
        "Probes",
        f"Probes of {cells.target.iloc[0]} on {examples:,} test "
        f"examples of {tables.documents_tested(table)}. Accuracy and bits have "
        f"{INTERVALS}; the intervals of the gain over the strongest baseline that needs no model "
        "hold for all cells together.",
        pictures=list(_probe_pictures(run, table)),
        tables=tables.probe_tables(table, ProbeResults(table, run.folder / "probes").best_cells()),
        notes=[*tables.probe_notes(cells), *_notes(run, "probes")],
    )


def transfer(run: Run) -> Iterator[Section]:
    """Which value's probe reads which value."""
    if not has(run, TRANSFER_FILE):
        return
    found, best = run.transfer(), ProbeResults(run.probes(), run.folder / "probes").best_cells()
    pictures = [
        Picture(
            f"transfer_{panel.name}",
            f"{panel.variant}, {panel.title}: rows are what probes were fitted on, columns what they were "
            "tested on.",
            f"Matrix of {described(main_metric(found)).label} by {found.by.iloc[0]}; see the table below.",
            svg_of(draw_transfer(found, panel, best)),
            panel.variant == "random",
        )
        for panel in panels(found.assign(reader="probe"))
    ]
    yield Section(
        "Transfer",
        "Probes fitted on the documents of each value alone, at the best cells of all probes. A probe of the "
        "concept reads every value as well as that value's own probe does.",
        pictures=pictures,
        tables=tables.transfer_tables(found, best),
        notes=list(tables.transfer_notes(found, best)),
    )


def geometry(run: Run) -> Iterator[Section]:
    """How many directions activations vary in, and which features rule."""
    if not has(run, GEOMETRY_FILE):
        return
    table = run.geometry()
    yield Section(
        "Geometry",
        "Activations that probes are fitted and chosen on. Ranks are corrected for how few the examples are; "
        "rogue features are those whose root mean square is far above the median feature's.",
        pictures=[
            Picture(
                "geometry",
                "By layer; thin lines are the other positions.",
                "Effective rank, mean cosine, norms and rogue features by layer; see the table below.",
                svg_of(plot_geometry(table)),
            )
        ],
        tables=list(tables_compare.geometry_tables(table)),
        notes=list(geometry_notes(table)),
    )


def _probe_pictures(run: Run, table: pd.DataFrame) -> Iterator[Picture]:
    """Heat maps and curves for each location, horizon and solver; the usual location first."""
    variants_at: dict[tuple[str, int, str], set[str]] = {}
    for panel in panels(table):
        variants_at.setdefault((panel.location, panel.horizon, panel.solver), set()).add(panel.variant)
    grids = sorted(variants_at, key=lambda grid: grid[0] != PREFERRED["location"])
    for place, (location, horizon, solver) in enumerate(grids):
        there = variants_at[location, horizon, solver]
        variants = [name for name in probed_variants(table) if name in there]
        where: dict[str, Any] = {"location": location, "horizon": horizon, "solver": solver}
        metric = described(main_metric(table)).label
        name, shown = f"{label(location)}, horizon {horizon}, {solver}", ", ".join(variants)
        file = re.sub(r"[^\w-]+", "_", f"{location}_h{horizon}_{solver}")
        yield Picture(
            f"heatmap_{file}",
            f"{name}: test {metric} by layer and position, all on one scale.",
            f"Heat maps of {metric} by layer and position at {location}, for {shown}.",
            svg_of(plot_probes(run, variants, **where)),
            place >= UNFOLDED,
        )
        yield Picture(
            f"curve_{file}",
            f"{name}: {metric} of each variant's best layer by position, or by layer at a single one, with "
            "baselines and ceilings.",
            f"{metric[0].upper()}{metric[1:]} by position or layer at {location}, for {shown}, "
            "beside baselines and ceilings.",
            svg_of(plot_curve(run, variants, **where)),
            place >= UNFOLDED,
        )


def over_training(run: Run) -> Iterator[Section]:
    """What probes read at the checkpoints of each stage: the picture, and the best layer by step."""
    for stage in probed_stages(run):
        table = run.probes_over_training(stage)
        metric = described(main_metric(table)).label
        picture = Picture(
            f"over_training_{stage.replace('/', '_')}",
            f"Test {metric} at {table.step.nunique():,} steps of {stage}, by layer and by position; bands "
            f"are {INTERVALS}{', and below are the losses' if len(run.losses_of(stage)) else ''}.",
            f"{metric[0].upper()}{metric[1:]} against training steps of {stage}; the table below has the "
            "best layer at every step.",
            svg_of(plot_over_training(run, stage)),
        )
        folders = [path.relative_to(run.folder) / "probes" for path in run.checkpoints(stage).values()]
        notes = dict.fromkeys(note for folder in folders for note in _notes(run, folder))
        numbers = tables.over_training_table(table, stage)
        yield Section(f"Over training: {stage}", pictures=[picture], tables=[numbers], notes=list(notes))


def continuation(run: Run) -> Iterator[Section]:
    """What the LM writes after one activation alone, beside its controls."""
    if has(run, CONTINUATION):
        table = run.continuation()
        yield Section(
            "Continuation",
            "What the LM writes after the activation before a sentence, alone in an empty context, and the "
            f"true sentences of {int(table.documents.max()):,} test documents.",
            tables=tables.continuation_tables(table),
            notes=_notes(run, "continuation"),
        )


def interventions(run: Run) -> Iterator[Section]:
    """What interventions in each variant do beyond random ones, at the nearest distance first."""
    variants = variants_with(run, "interventions")
    table = compared_interventions(run) if variants else pd.DataFrame()
    for variant in variants:
        rows = table[table.variant == variant]
        near = rows.distance == rows.groupby("kind").distance.transform("min")
        farther = tables.intervention_tables(rows[~near], folded=True) if not near.all() else []
        yield Section(
            f"Interventions: {variant}",
            f"What the variant {variant} makes of changed activations, at one sentence boundary of each of "
            f"{int(rows.documents.max()):,} test documents. Shown are conditions that are compared with "
            "random ones; all rows, those of the controls too, are in the run's folder.",
            tables=[*tables.intervention_tables(rows[near]), *farther],
            notes=[*tables.intervention_notes(rows), *_notes(run, f"interventions/{variant}")],
        )


def subnetworks(run: Run) -> Iterator[Section]:
    """What each variant has lost without its subnetwork, and without as many other components."""
    for variant in variants_with(run, "subnetworks"):
        table, masks = run.subnetworks(), run.subnetwork_masks()
        own, mask = table[table.variant == variant], masks[masks.variant == variant]
        notes = [*tables.subnetwork_notes(own, mask), *_notes(run, f"subnetworks/{variant}")]
        yield Section(f"Subnetwork: {variant}", tables=[tables.subnetwork_table(own)], notes=notes)


def _notes(run: Run, folder: str | Path) -> list[str]:
    """The notes on a folder's tables."""
    path = run.folder / folder / "settings.json"
    return [str(note) for note in read_json(path).get("notes", [])] if path.is_file() else []


# How it was made


def stages(run: Run) -> Iterator[Section]:
    """Finished stages, their times and their parameters."""
    if finished := run.stages:
        yield Section("Stages", tables=[tables.stages_table(finished)])


def training(run: Run) -> Iterator[Section]:
    """Losses of every stage, as curves and as the numbers at their ends."""
    if not has(run, "metrics.jsonl"):
        return
    rows = []
    for stage, own in run.metrics().groupby("stage", sort=False):
        losses = own.loss.dropna()
        ends = {
            "first_loss": losses.iloc[0],
            "last_loss": losses.tail(max(1, len(losses) // 20)).mean(),  # a single row is a single batch
            "lowest_validation_loss": own.validation_loss.min() if "validation_loss" in own else None,
        }
        rows.append({"stage": stage, "steps": int(own.step.max()), **ends})
    caption = (
        "Losses in nats: the first, the mean of the last twentieth that was logged, on validation documents"
    )
    table = display(caption, pd.DataFrame(rows), [*rows[0]])
    picture = Picture(
        "training",
        "Losses by step, moving averages over a twentieth of the logged rows; dots: on validation documents.",
        f"Training curves of {len(rows)} stages; the table below has their ends.",
        svg_of(plot_training(run)),
    )
    more: dict[str, list[str]] = {
        "the planner's own loss": [name for name in run.variants if VARIANTS[name].joint],
        "the distillation loss": [name for name in run.members if MEMBERS[name].distilled],
    }
    parts = [f"{loss} ({', '.join(names)})" for loss, names in more.items() if names]
    text = (
        f"Training losses include {' and '.join(parts)}; validation losses are of tokens alone."
        if parts
        else ""
    )
    yield Section("Training", text, pictures=[picture], tables=[table])


def reproduction(run: Run) -> Iterator[Section]:
    """Commands that make the run again, and where it was made."""
    if not has(run, "provenance.json"):
        return
    origin, planted = read_json(run.folder / "provenance.json"), run.config.corpus.reader == "planted"
    facts = {
        "begun": origin["begun"],
        "command": shlex.join(map(str, origin["command"])),
        "git commit": origin["git_commit"] or "not from a checkout",
        "seed": str(run.config.seed),
        "seed of the corpus": str(run.config.corpus.seed),
        **({"seed of the planted text": str(run.config.corpus.planted.seed)} if planted else {}),
        "device": origin["device"],
        **{f"machine: {name}": str(value) for name, value in origin["machine"].items()},
        **{name: str(version) for name, version in origin["versions"].items()},
    }
    commit = [f"# probekit at commit {origin['git_commit']}"] if origin["git_commit"] else []
    yield Section(
        "How to reproduce it",
        "From the folder that the run is in, with the versions below. Its config.yaml is complete, seeds "
        "and all; the settings that are given beside it are those in which results differ from it.",
        "\n".join([*commit, *map(shlex.join, commands(run))]),
        "sh",
        tables=[_facts("Where it was made", facts)],
    )


def commands(run: Run) -> Iterator[list[str]]:
    """The commands that make a run and its results again, as words."""
    again, config = f"{run_name(run)}-again", f"{run_name(run)}/config.yaml"
    any_model = ["probekit", "probe", "--model", str(run.config.lm.name), "--config", config, "--out", again]
    if only_probed(run):
        if has(run, PROBES):
            yield [*any_model, *_options(changed_settings(run, "probes/settings.json"))]
    else:
        yield ["probekit", "train", "--config", config, "--out", again]
        if has(run, EVALUATION) or has(run, GENERATION):
            flag = ["--generation"] if has(run, GENERATION) else []
            changed = changed_settings(run, EVALUATION) | changed_settings(run, GENERATION)
            yield ["probekit", "evaluate", again, *flag, *_options(changed)]
        if has(run, PROBES):
            changed = changed_settings(run, "probes/settings.json")
            yield ["probekit", "probe", again, *_options(changed, "probe")]
    yield from _commands_over_training(run, any_model, again)
    if has(run, CONTINUATION):
        changed = changed_settings(run, "continuation/settings.json")
        drawing = ("seed", "generation.temperature", "generation.top_k", "generation.top_p")
        yield ["probekit", "continuation", again, *_options(changed, "continuation", *drawing)]
    for kind, command in (("interventions", "intervene"), ("subnetworks", "subnetwork")):
        for variant in variants_with(run, kind):
            changed = changed_settings(run, f"{kind}/{variant}/settings.json")
            changed = {f"{command}.variant": variant} | changed
            yield ["probekit", command, again, *_options(changed, command)]


def _commands_over_training(run: Run, any_model: Sequence[str], again: str) -> Iterator[list[str]]:
    """The commands that probe checkpoints again, those of a training or published ones."""
    for stage in probed_stages(run):
        changed = {}
        if kept := run.checkpoints(stage):
            folder = kept[max(kept)].relative_to(run.folder).as_posix()
            changed = changed_settings(run, f"{folder}/probes/settings.json")
        # Without probe.variants, the command probes what the stage trains.
        if list(changed.get("probe.variants", ())) == ["none" if stage == "lm" else stage.split("/")[-1]]:
            del changed["probe.variants"]
        words = ["probekit", "probe", again, "--checkpoints", "--stage", stage]
        if only_probed(run):
            names = (name_of(Run.open(path).config, step) for step, path in kept.items())
            words = [*any_model, "--revisions", *names]
        yield [*words, *_options(changed, "probe")]


def _options(settings: dict[str, Any], section: str | None = None, *more: str) -> list[str]:
    """Settings as options; only those that a command with a section of its own takes, and some more."""
    return [
        word
        for name, value in settings.items()
        if section is None or name.split(".")[0] in ("device", "evaluation", section) or name in more
        for word in (f"--{name}", *setting_words(value))
    ]


def settings(run: Run) -> Iterator[Section]:
    """All settings."""
    yield Section("Settings", code=run.config.to_yaml(), language="yaml")


SECTIONS = (
    *(about, corpus, evaluation, generation, probes, transfer, geometry, over_training),
    *(continuation, interventions, subnetworks, stages, training, reproduction, settings),
)
"""What makes the sections, in their order; each makes those that the run has results for."""
