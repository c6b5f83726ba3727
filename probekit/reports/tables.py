"""The display tables of every kind of result, and the notes that belong to them.

The terminal and the report show these; how a column is shown is decided in `display`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from probekit.config import nearest, reading_order
from probekit.data.corpus import Corpus, action_table, sentence_lengths, sizes
from probekit.models.locations import label
from probekit.probing.results import MODEL_FREE, main_metric, validation_loss
from probekit.probing.transfer import ALL
from probekit.reports.display import (
    INTERVALS,
    Table,
    by_metric,
    cell,
    display,
    heading,
    number,
    ordered,
    shortened,
)

SHOWN_ACTIONS = 30
"""Actions that the table of a corpus shows, the most frequent ones."""

MANY_ROWS = 12
"""Longer tables of differences are folded on a page."""

MORE_BOUNDARIES = "raise intervene.boundaries, or intervene.samples where that is fewer"
"""What to do where interventions are measured in few documents."""

MORE_CONTINUED = "raise continuation.boundaries, or give more documents"
"""What to do where continuations are measured in few documents."""

MORE_SUBNETWORK_DOCUMENTS = "raise subnetwork.documents, or give more documents"
"""What to do where a subnetwork is measured on few documents."""

REGRESSION = ("r2", "rank_correlation", "cosine", "reciprocal_rank", "first_percent", "squared_error")
"""Metrics of numbers and of vectors, of which each has some."""

METRICS_OF = {
    "accuracy": (
        ("accuracy", "bits", "gain", "gain_over", "selectivity", "compression"),
        ("accuracy", "bits"),
    ),
    "auroc": (
        ("auroc", "accuracy", "bits", "gain", "gain_over", "selectivity", "compression"),
        ("auroc", "accuracy", "bits"),
    ),
    "r2": (
        (*REGRESSION, "gain_r2", "gain_over", "selectivity"),
        REGRESSION,
    ),
}
"""What tables show of probes and of baselines, by the main metric of the target, as far as it has them."""

METRIC_WORDS = {"bits": "bits over the prior", "r2": "R²"}
"""What notes call metrics."""

CELL = ["variant", "location", "solver", "layer", "position", "horizon", "seed"]
"""What identifies a cell of the grid of probes."""

GAIN_R2 = {f"gain{end}": f"gain_r2{end}" for end in ("", "_low", "_high")}
"""The gain of numbers is no bits."""

EFFECTS = ("next_loss", "next_loss_over_random", "rest_loss_over_random", "other_loss", "readout_true")
ERASURE = ("fitted_accuracy", "refitted_accuracy", "prior_accuracy")
STEERING = ("plan_following", "plan_following_unedited", "plan_following_over_random")
SUBNETWORK = ("first_loss_change", "rest_loss_change", "other_loss_change", "bits", "refitted_bits")

CONTINUED = (
    *("cosine", "cosine_over_other", "cosine_over_nothing", "cosine_over_ridge"),
    *("true_action", "true_action_over_other", "rouge2"),
)
"""Metrics of continuations that are shown."""

REMOVED = {
    "whole": "nothing",
    "subnetwork": "the subnetwork",
    "alone": "best alone",
    "random": "random",
}
"""Conditions of a subnetwork, in their order, by what is removed."""


# Corpus and training


def corpus_tables(corpus: Corpus, nearest: int = 1) -> list[Table]:
    """Sizes by split, quantiles of sentence lengths, and actions with the sentences nearest to each."""
    split = sizes(corpus)
    split.loc["all"] = split.sum()
    lengths = sentence_lengths(corpus)
    quantiles = pd.DataFrame(
        [[f"{value:.0f}" for value in lengths]], columns=[f"{q:.0%}" for q in lengths.index]
    )
    shown = [
        display("Corpus by split", split.reset_index(names="split"), ["split", *sizes(corpus).columns]),
        Table("Sentence lengths in tokens, by quantile", quantiles),
    ]
    return [*shown, _actions_table(corpus, nearest)] if corpus.has_actions else shown


def _actions_table(corpus: Corpus, nearest: int) -> Table:
    actions = action_table(corpus, nearest)
    top = actions.head(SHOWN_ACTIONS)
    rarer = len(actions) - len(top)
    left_out = f"; {rarer:,} rarer ones are left out" if rarer > 0 else ""
    caption = (
        f"Actions ({corpus.k:,}) by training sentences, with the words that set each apart and the sentences "
        f"nearest to it{left_out}"
    )
    histogram = pd.DataFrame(
        {
            "action": top.index.astype(str),
            "sentences": top.sentences.map("{:,}".format),
            "share": top["share"].map("{:.1%}".format),
            "": ("█" * round(12 * share / actions["share"].max()) for share in top["share"]),
            "words": top["words"].map(shortened),
            "nearest sentences": ("\n".join(map(shortened, texts)) for texts in top["nearest"]),
        },
        dtype="str",
    )
    return Table(caption, histogram, folded=True)


def stages_table(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    """The finished stages of a run, by name as in its run.json."""
    names = ("seconds", "parameters", "tuned_parameters", "precision", "dtype", "taken_from")
    rows = [{"stage": stage, **{name: facts.get(name) for name in names}} for stage, facts in stages.items()]
    table = pd.DataFrame(rows, columns=["stage", *names], dtype=object)
    table["seconds"] = table.seconds.astype(float)
    caption = (
        f"Training stages, {table.seconds.sum():,.0f} seconds in all; parameters are those that were trained"
    )
    known = [name for name in names if table[name].notna().any() or name == "seconds"]
    return display(caption, table, ["stage", *known])


# Evaluation and generated text


def perplexity_tables(perplexity: pd.DataFrame, differences: pd.DataFrame) -> list[Table]:
    """Perplexity of everything that was evaluated, and the difference of every two."""
    documents, tokens = int(perplexity.documents.iloc[0]), int(perplexity.tokens.iloc[0])
    caption = f"Perplexity per token on {documents:,} test documents, {tokens:,} tokens ({INTERVALS})"
    table = display(caption, perplexity, ["variant", "actions", "perplexity", "documents"])
    return [table, *_differences("perplexity", differences)]


def planner_table(planner: pd.DataFrame) -> Table:
    """What planners, baselines and ceilings know of the next action."""
    sentences, documents = int(planner.sentences.iloc[0]), int(planner.documents.iloc[0])
    return display(
        f"Next action on {sentences:,} test sentences of {documents:,} documents ({INTERVALS})",
        by_metric(planner, ["reader"]),
        ["reader", *ordered(planner.metric)],
    )


def choice_tables(accuracy: pd.DataFrame, differences: pd.DataFrame) -> list[Table]:
    """Multiple choice: the share of questions that is solved, and the difference of every two."""
    questions, documents = int(accuracy.questions.iloc[0]), int(accuracy.documents.iloc[0])
    caption = (
        f"Multiple choice: {questions:,} questions of {documents:,} documents, by chance "
        f"{number(accuracy.chance.iloc[0])} ({INTERVALS})"
    )
    return [display(caption, accuracy, ["variant", "accuracy"]), *_differences("accuracy", differences)]


def asked_table(table: pd.DataFrame) -> Table:
    """Forced choice: what each revision of an LM prefers, by kind of items and reader."""
    facts = ["revision", "kind", "items", "groups", "chance", "reader"]
    found = ["accuracy", "preference", "over_prior", "over_first", "margin", "rank_correlation"]
    of_groups = INTERVALS.replace("documents", "groups")
    caption = f"Choices by {table.scoring.iloc[0]} log-probability ({of_groups})"
    return display(caption, table, [*facts, *(name for name in found if name in table)], optional=facts)


def asked_notes(table: pd.DataFrame, answers: pd.DataFrame) -> Iterator[str]:
    """What to mind of a forced choice."""
    one = answers[answers.revision.isin(answers.revision.head(1))]  # all are asked the same items
    tokens = one.groupby("item").tokens
    unequal, scoring = int((tokens.min() < tokens.max()).sum()), table.scoring.iloc[0]
    if unequal:
        yield (
            f"In {unequal:,} of {len(tokens):,} items one choice has more tokens than another: total "
            f"log-probability favours short choices, the mean long ones; this is the {scoring}"
        )
    if answers.prior.isna().all():
        yield "No item has a context: there is no prior to compare with"
    if "preference" in table:
        yield (
            "No choice is true: these are paired differences between how probable the LM finds the first "
            "choice and the others"
        )


def _differences(of: str, differences: pd.DataFrame) -> Iterator[Table]:
    if len(differences):
        yield display(
            f"Differences of {of}, paired over documents ({INTERVALS})",
            differences,
            ["first", "second", "difference", "documents"],
            folded=len(differences) > MANY_ROWS,
        )


def generation_tables(metrics: pd.DataFrame) -> list[Table]:
    """Metrics of generated text: a table for each kind and length of texts, and one of plans."""
    plans = metrics.metric.str.startswith("plan_following")
    parts = [
        (f"Generated {texts} of {length:,} tokens ({INTERVALS})", own)
        for (texts, length), own in metrics[~plans].groupby(["texts", "length"], sort=False)
    ]
    if plans.any():
        parts.append((f"Sentences that have the action they were given ({INTERVALS})", metrics[plans]))
    tables = []
    for caption, own in parts:
        names = [
            "variant",
            "actions",
            *ordered(own.metric),
            "documents",
            *(["empty"] if own["empty"].any() else []),
        ]
        tables.append(display(caption, by_metric(own, ["variant", "actions"]), names))
    return tables


def generation_notes(metrics: pd.DataFrame) -> Iterator[str]:
    """What blank texts count as, where there are any."""
    if metrics["empty"].any():
        yield "Blank texts count as entirely different from true ones, and are left out of latent perplexity"


# Probes


def documents_tested(table: pd.DataFrame) -> str:
    """How many documents probes were tested on, and in how many groups if they are fewer."""
    documents, groups = int(table.documents.max()), int(table.groups.max())
    return f"{documents:,} documents" + (f" in {groups:,} groups" if groups < documents else "")


def _metrics(table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """What is shown of the probes and of the baselines of a table."""
    of_probes, of_baselines = METRICS_OF[main_metric(table)]
    known = {*table.columns, "gain_r2"}
    return [name for name in of_probes if name in known], [name for name in of_baselines if name in known]


def probe_tables(table: pd.DataFrame, best: pd.DataFrame) -> list[Table]:
    """The best cells, and the baselines and ceilings at the same positions and horizons.

    Args:
        table: All rows of `probekit probe`.
        best: Its best cells.
    """
    cells = best.sort_values(["horizon", "variant", "location", "solver", "seed"])
    examples = int(table.examples.max())
    keys = ["target", "variant", "location", "solver", "layer", "position", "horizon", "seed"]
    caption = (
        f"Best cells, chosen on validation documents, on {examples:,} test examples of "
        f"{documents_tested(table)}"
    )
    metrics, of_baselines = _metrics(table)
    if "gain_r2" in metrics:
        cells = cells.rename(columns=GAIN_R2)
    beside = table[table.reader != "probe"].merge(best[["position", "horizon"]].drop_duplicates())
    return [
        display(
            caption,
            cells,
            [*keys, *metrics],
            optional=["target", "location", "solver", "horizon", "seed", "selectivity", "compression"],
        ),
        display(
            "Baselines and ceilings at the positions and horizons of these cells, on the same examples",
            beside.sort_values(["horizon", "distance", "position"], kind="stable"),
            ["reader", "position", "horizon", "seed", *of_baselines],
            optional=["seed"],
        ),
    ]


def transfer_cells(transfer: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """The rows of transfer at the best cells of the table of probes."""
    return transfer.merge(best[CELL].drop_duplicates(), on=CELL)


def transfer_tables(transfer: pd.DataFrame, best: pd.DataFrame) -> list[Table]:
    """What the probe of each value reads of every other, and how that compares with the other's own probe.

    Args:
        transfer: The table of transfer.
        best: The best cells of the table of probes.
    """
    tables = []
    for cell_, own in transfer_cells(transfer, best).groupby(CELL, sort=False):
        variant, location, solver, layer, position, horizon, seed = cell_
        at = f"{variant}, {label(str(location))}, layer {layer}, position {position}, horizon {horizon}, "
        at += f"{solver}, seed {seed}"
        metric = main_metric(own)
        for name in (metric, "over_own"):
            shown = own.assign(text=[cell(row, name) for row in own.to_dict("records")])
            order = list(dict.fromkeys(own.fitted_on)), list(dict.fromkeys(own.tested_on))
            matrix = shown.pivot_table("text", "fitted_on", "tested_on", aggfunc="first").loc[order]
            what = f"{heading(metric)} of probes fitted on a row's {own.by.iloc[0]}, tested on a column's"
            if name == "over_own":
                what = f"{'R²' if metric == 'r2' else 'Accuracy'} less that of the column's own probe, paired"
            caption = f"{what}; {at} ({INTERVALS})"
            cells = matrix.reset_index(names="fitted on").rename_axis(columns=None)
            tables.append(Table(caption, cells.astype("str"), folded=name == "over_own"))
    return tables


def transfer_notes(transfer: pd.DataFrame, best: pd.DataFrame) -> Iterator[str]:
    """How many probes read less of another value than that value's own probe."""
    rows = transfer_cells(transfer, best)
    others = rows[(rows.fitted_on != rows.tested_on) & (rows.fitted_on != ALL) & rows.over_own_low.notna()]
    for variant, own in others.groupby("variant", sort=False):
        worse, above = (own.over_own_high < 0).sum(), (own.bits_low > 0).sum() if "bits_low" in own else None
        prior = "" if above is None else f"; {above:,} predict it better than its own prior does (bits)"
        yield (
            f"{variant}: of {len(own):,} probes tested on another {own.by.iloc[0]}, {worse:,} read less than "
            f"its own probe{prior}"
        )


def better_than_baselines(probes: pd.DataFrame) -> pd.Series:
    """Whether probes read more than the strongest baseline that needs no model.

    They do where the gain, a paired difference, is above zero with its interval, which holds for all cells
    together. Intervals of two accuracies on the same documents may overlap nevertheless.
    """
    return probes.gain_low > 0.0


def probe_notes(probes: pd.DataFrame) -> Iterator[str]:
    """How many probes read more than the strongest baseline that needs no model."""
    compared = probes[probes.gain_low.notna() & ~probes.injected]
    if len(compared):
        better = better_than_baselines(compared).groupby(compared.variant).agg(["sum", "count"])
        each = ", ".join(f"{variant} {won} of {of}" for variant, won, of in better.itertuples())
        yield (
            f"{better['sum'].sum():,} of {len(compared):,} cells read more than the "
            f"{' or '.join(sorted(compared.gain_over.unique()))}, 95 % for all together ({each})"
        )


def baseline_notes(table: pd.DataFrame) -> Iterator[str]:
    """Where a gain is above zero, but another baseline is better on test examples and than the probe.

    The baseline that a gain is over is chosen on validation examples; of few documents it can be another one.
    """
    metric = "r2" if main_metric(table) == "r2" else "bits"
    free = table[table.reader.isin(MODEL_FREE) & table[metric].notna()]
    cell = ["position", "horizon"]
    best = free.loc[free.groupby(cell)[metric].idxmax(), [*cell, "reader", metric]]
    probes = table[(table.reader == "probe") & (table.gain > 0) & ~table.injected]
    beside = probes.merge(best, on=cell, suffixes=("", "_beside"))
    below = beside[beside[metric] < beside[f"{metric}_beside"]]
    for (over, better), own in below.groupby(["gain_over", "reader_beside"]):
        yield (
            f"{len(own):,} of {len(probes):,} cells with a gain above zero read less than the {better}: the "
            f"{over} is the strongest baseline on validation examples, and its gain is over that, but the "
            f"{better} is on test examples ({number(own[f'{metric}_beside'].max())} {METRIC_WORDS[metric]})"
        )


def unreliable_probes(probes: pd.DataFrame) -> Iterator[str]:
    """How many cells are empty, how many have constant activations, and how many probes did not converge."""
    empty = probes[probes[main_metric(probes)].isna()]
    if len(empty):
        where = "; ".join(
            f"position {', '.join(reading_order(cells.position))} of horizon {horizon}"
            for horizon, cells in empty.groupby("horizon")
        )
        yield f"{len(empty):,} of {len(probes):,} cells are empty (too few examples): {where}"
    if constant := int(probes.constant.fillna(value=False).sum()):
        yield f"{constant:,} of {len(probes):,} cells have the same activation in all examples"
    if unconverged := int((~probes.converged.fillna(value=True)).sum()):
        yield f"{unconverged:,} of {len(probes):,} probes did not converge"


def best_by_step(table: pd.DataFrame) -> pd.DataFrame:
    """The probes of the best layer at every checkpoint, chosen on validation documents.

    Args:
        table: Rows of `probe_checkpoints`.

    Returns:
        A row for every variant, location, solver, horizon, seed and step, at the nearest position.
    """
    probes = table[(table.reader == "probe") & table[main_metric(table)].notna()]
    near = probes[probes.position == nearest(probes.position)]
    keys = ["variant", "location", "solver", "horizon", "seed", "step"]
    best = near.assign(loss=validation_loss(near)).groupby(keys).loss.idxmin()
    return near.loc[best].sort_values(keys, kind="stable")


def over_training_table(table: pd.DataFrame, stage: str) -> Table:
    """The best layer after each step of a stage whose checkpoints were probed."""
    best = best_by_step(table)
    keys = ["variant", "location", "solver", "horizon", "seed"]
    metrics, _ = _metrics(table)
    best = best.rename(columns=GAIN_R2) if "gain_r2" in metrics else best
    return display(
        f"Best layer after each step of {stage}, chosen on validation documents, at position "
        f"{best.position.iloc[0]}, on {int(best.documents.max()):,} test documents ({INTERVALS})",
        best,
        [*keys[:3], "step", "layer", *keys[3:], *metrics[: metrics.index("gain_over") + 1]],
        optional=keys,
    )


# Interventions and subnetworks


def intervention_tables(table: pd.DataFrame, *, folded: bool = False) -> list[Table]:
    """What interventions of one variant do: a table for each kind, and two that compare kinds."""
    condition = table.condition + table.strength.map(" × {:g}".format).where(table.strength.notna(), "")
    marks = table.readout_direct.map({True: "*", False: ""}) + table.injected.map({True: "+", False: ""})
    layer = table.location.map(label) + " " + table.layer.astype("Int64").astype("str")
    rows = table.assign(condition=condition, layer=layer.where(table.layer.notna(), "") + marks)
    losses = "losses in nats per token, and the probability that the last layer's probe gives the true label"
    kinds = rows.groupby("kind", sort=False)
    parts = [
        *((f"{kind}: changes of {losses}", own, EFFECTS) for kind, own in kinds),
        ("Accuracy of a linear probe where actions were erased", rows, ERASURE),
        ("Share of sentences written anew that have the action aimed at", rows, STEERING),
    ]
    keys = ["kind", "layer", "condition", "distance"]
    tables = []
    for caption, own, metrics in parts:
        found = own[own.metric.isin(metrics)]
        measured = found[found.metric == metrics[0]][["kind", "condition"]].drop_duplicates()
        if len(measured):
            wide = by_metric(found.merge(measured), keys)
            distances = sorted(wide.distance.unique())
            where = (
                f"variant {table.variant.iloc[0]}, distance {', '.join(map(str, distances))} ({INTERVALS})"
            )
            hidden = {"kind"} if metrics is EFFECTS else set()
            hidden |= {"distance"} if len(distances) == 1 else set()
            columns = [*keys, *metrics, "documents"]
            shown = [name for name in columns if name in wide and name not in hidden]
            tables.append(display(f"{caption}; {where}", wide, shown, optional=["documents"], folded=folded))
    return tables


def intervention_notes(table: pd.DataFrame) -> Iterator[str]:
    """What the columns and marks of `intervention_tables` mean."""
    yield (
        "over random: the change beyond that of an equally large change in a random direction; rest: all "
        "tokens of the next sentence but the first"
    )
    if table.readout_direct.any():
        yield "* the edit changes the activation that the probe reads: the probe shows no effect on the LM"
    if table.injected.any():
        yield "+ the adapter has already given the LM the next sentence's action there"


def continuation_tables(table: pd.DataFrame) -> list[Table]:
    """What the LM writes after one activation, a table for each sentence ahead."""
    numbers = table.layer.astype("str")
    activations = table.condition.isin(["activation", "other document"])
    rows = table.assign(layer=numbers.where(table.layer.notna(), activations.map({True: "all", False: ""})))
    keys, tables = ["condition", "layer", "horizon"], []
    for horizon, own in rows.groupby("horizon", sort=False):
        wide = by_metric(own, keys)
        shown = [name for name in CONTINUED if name in wide]
        caption = f"What is written and the true sentence {horizon} ahead ({INTERVALS})"
        tables.append(display(caption, wide, [*keys[:2], *shown, "documents"], optional=["documents"]))
    return tables


def subnetwork_table(table: pd.DataFrame) -> Table:
    """What a variant loses without its subnetwork, and without as many other components.

    Random draws are shown as one condition, their mean.
    """
    means = table[table.draw.isna()]
    rows = pd.concat(
        by_metric(means[means.condition == name].assign(condition=called), ["condition", "removed"])
        for name, called in REMOVED.items()
    )
    caption = (
        f"Without some of {table.components.iloc[0]} components, on {int(table.documents.max()):,} test "
        "documents: changes of the next sentence's losses in nats per token, bits over the prior that the "
        f"last layer's probe reads; variant {table.variant.iloc[0]} ({INTERVALS})"
    )
    return display(caption, rows, ["condition", "removed", *SUBNETWORK])


def subnetwork_notes(table: pd.DataFrame, mask: pd.DataFrame) -> Iterator[str]:
    """What the rows of `subnetwork_table` mean, and which components the subnetwork has."""
    yield (
        "best alone: as many components, those that are best removed one at a time; random: as many in "
        f"every layer, the mean of {table.draw.nunique()} draws, with intervals over draws and documents"
    )
    yield "refitted probe: fitted again without the components, so that it finds what has only moved"
    removed = mask[mask.removed]
    yield f"The subnetwork ({len(removed)} of {len(mask)}): {', '.join(removed.component) or 'nothing'}"


# Sweeps


def sweep_tables(table: pd.DataFrame) -> list[Table]:
    """The mean over seeds of every metric, a table for each metric, kind and length of texts."""
    tables = []
    means = table[table.seed.isna()]
    for (metric, texts, length), own in means.groupby(["metric", "texts", "length"], sort=False):
        of_length = f" of {length:,} tokens" if length else ""
        tables.append(
            display(
                f"{heading(str(metric))} of {texts}{of_length}, mean over seeds ({INTERVALS})",
                own.rename(columns=lambda name: name.replace("value", "mean_over_seeds")),
                ["member", "variant", "actions", "mean_over_seeds", "seed_spread", "seeds", "documents"],
            )
        )
    return tables
