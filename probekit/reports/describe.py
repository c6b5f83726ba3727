"""How results are shown: one description of every column, and the display tables that follow from it.

In a result table the 95 % interval of a column `x` is in `x_low` and `x_high`. A display table holds strings
only: the terminal, the report and notebooks show the same ones, so that nothing is formatted twice.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unicodedata import category

import pandas as pd

from probekit.data.corpus import Corpus, action_table, sentence_lengths, sizes
from probekit.models.hook_points import label

INTERVALS = "95 % intervals from resampling documents"

SHOWN_ACTIONS = 30
"""Actions that the table of a corpus shows, the most frequent ones."""

SHOWN_CHARACTERS = 100
"""Characters of a sentence that are shown."""

MANY_ROWS = 12
"""Longer tables of differences are folded on a page."""


MORE_BOUNDARIES = "raise intervene.boundaries, or intervene.samples where that is fewer"
"""What to do where interventions are measured in few documents."""

MORE_SUBNETWORK_DOCUMENTS = "raise subnetwork.documents, or give more documents"
"""What to do where a subnetwork is measured on few documents."""


class Column(NamedTuple):
    """How a column or metric is shown: `better` is 1 (higher), -1 (lower) or 0 (neither)."""

    label: str
    unit: str = ""
    better: int = 0
    decimals: int = 3
    signed: bool = False


COLUMNS: dict[str, Column] = {
    # Perplexity and multiple choice
    "perplexity": Column("perplexity", better=-1),
    "difference": Column("first - second", signed=True),
    # Planners, probes, multiple choice
    "accuracy": Column("accuracy", better=1),
    "top5": Column("top-5 accuracy", better=1),
    "cross_entropy": Column("cross-entropy", "nats", better=-1),
    "bits": Column("bits over the prior", better=1),
    "gain": Column("gain in bits", better=1, signed=True),
    "gain_over": Column("gain over"),
    "selectivity": Column("selectivity", better=1, signed=True),
    "compression": Column("compression", better=1),
    "shortfall": Column("below the ceiling", "bits", better=-1),
    "auroc": Column("AUROC", better=1),
    "calibration_error": Column("calibration error", better=-1),
    "r2": Column("R²", better=1),
    "rank_correlation": Column("rank correlation", better=1),
    # Generated text
    "rouge2": Column("ROUGE-2", better=1),
    "levenshtein": Column("edit distance", "actions", better=-1),
    "levenshtein_normalised": Column("edit distance, normalised", better=-1),
    "latent_perplexity": Column("latent perplexity", better=-1),
    "mauve": Column("MAUVE", better=1),
    "empty": Column("blank texts"),
    "plan_following": Column("given action", better=1),
    "plan_following_by_chance": Column("given action, by chance"),
    # Interventions: changes of the loss, in nats a token, and what probes read
    "next_loss": Column("next sentence", signed=True),
    "next_loss_over_random": Column("over random", signed=True),
    "rest_loss_over_random": Column("rest, over random", signed=True),
    "other_loss": Column("later sentences", signed=True),
    "readout_true": Column("probe, true action"),
    "fitted_accuracy": Column("before erasing"),
    "refitted_accuracy": Column("refitted after erasing"),
    "prior_accuracy": Column("most frequent action"),
    "plan_following_unedited": Column("without the edit"),
    "plan_following_over_random": Column("given action, over random", better=1, signed=True),
    # Subnetworks
    "removed": Column("components"),
    "first_loss_change": Column("first token", signed=True),
    "rest_loss_change": Column("rest of it", signed=True),
    "other_loss_change": Column("first sentences", signed=True),
    "refitted_bits": Column("bits, refitted probe", better=1),
    # Sweeps and stages
    "seed_spread": Column("spread over seeds"),
    "seconds": Column("seconds", decimals=1),
    "tuned_parameters": Column("and of its LM"),
    "taken_from": Column("taken from"),
    # Losses of a stage of training
    "first_loss": Column("first", decimals=4),
    "last_loss": Column("last", decimals=4),
    "lowest_validation_loss": Column("lowest in validation", decimals=4),
}
"""All columns whose label is not simply their name, metrics in the order in which tables show them."""

ORDER = {name: number for number, name in enumerate(COLUMNS)}

EFFECTS = ("next_loss", "next_loss_over_random", "rest_loss_over_random", "other_loss", "readout_true")
ERASURE = ("fitted_accuracy", "refitted_accuracy", "prior_accuracy")
STEERING = ("plan_following", "plan_following_unedited", "plan_following_over_random")
SUBNETWORK = ("first_loss_change", "rest_loss_change", "other_loss_change", "bits", "refitted_bits")

REMOVED = {
    "whole": "nothing",
    "subnetwork": "the subnetwork",
    "alone": "best alone",
    "random": "random",
}
"""Conditions of a subnetwork, in their order, by what is removed."""


class Table(NamedTuple):
    """A display table: strings by column label, and whether a page hides it until it is asked for."""

    caption: str
    cells: pd.DataFrame
    folded: bool = False

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds nothing but numbers, and is aligned to the right."""
        return [bool(self.cells[name].str.match(r"[-+]?\d|$").all()) for name in self.cells]


def described(name: str) -> Column:
    """The description of a column; one that is not listed is called by its name."""
    return COLUMNS.get(name, Column(name.replace("_", " ")))


def heading(name: str) -> str:
    """A column's label with its unit, and an arrow towards better values."""
    column = described(name)
    unit = f" ({column.unit})" if column.unit else ""
    return column.label + unit + {1: " ↑", -1: " ↓", 0: ""}[column.better]


def with_interval(
    value: float | None, low: float | None, high: float | None, *, decimals: int = 3, signed: bool = False
) -> str:
    """A value with its interval, as `12.300 [11.900, 12.800]`; empty where there is no value.

    There are as many decimals as asked for, and more (up to six) where the interval is so narrow that two
    digits of its half-width need them.
    """
    if value is None or math.isnan(value):
        return ""
    sign = "+" if signed else "-"
    if low is None or high is None or not math.isfinite(half := (high - low) / 2):
        return f"{value:{sign}z,.{decimals}f} (no interval)"
    if half > 0:
        decimals = max(decimals, min(6, 1 - math.floor(math.log10(half))))
    number = f"{{:{sign}z,.{decimals}f}}"
    return f"{number} [{number}, {number}]".format(value, low, high)


def cell(row: Mapping[Hashable, Any], name: str) -> str:
    """A row's value as text, with its interval and its spread over seeds where the table has them."""
    value, column = row[name], described(name)
    if pd.isna(value):
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if f"{name}_low" not in row:
        return f"{value:{'+' if column.signed else '-'}z,.{column.decimals}f}"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    text = with_interval(value, low, high, decimals=column.decimals, signed=column.signed)
    spread = row.get(f"{name}_spread")
    return text if spread is None or pd.isna(spread) else f"{text}\nspread over seeds {spread:.4g}"


def display(
    caption: str,
    table: pd.DataFrame,
    columns: Iterable[str],
    *,
    optional: Sequence[str] = (),
    folded: bool = False,
) -> Table:
    """The display table of some columns of a result table.

    Args:
        caption: What it shows.
        table: The results.
        columns: Which of its columns, in their order.
        optional: Columns that are left out where they are empty, and that the caption names where all rows
            have the same value.
        folded: Whether a page hides it until it is asked for.
    """
    shown, same = [], []
    for name in columns:
        if name in optional and (name not in table or table[name].isna().all()):
            continue
        if name in optional and len(table[name].unique()) == 1:
            same.append(f"{described(name).label} {cell(table.iloc[0].to_dict(), name)}")
        else:
            shown.append(name)
    rows = table.to_dict("records")
    cells = pd.DataFrame({heading(name): [cell(row, name) for row in rows] for name in shown}, dtype="str")
    return Table(f"{caption}; {', '.join(same)}" if same else caption, cells, folded)


def by_metric(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Turns a table with a row for each metric into one with a column for each.

    Args:
        table: Columns `metric`, `value`, `value_low`, `value_high`, and `documents`, `seed_spread` or `empty`
            where these are known.
        keys: What rows of one condition have in common; values may be missing.

    Returns:
        A row for each condition, in the order in which they come: the keys, for each metric `m` columns
        `m`, `m_low`, `m_high` and `m_spread`, and the largest number of `documents` and `empty` texts.
    """
    rows = []
    for key, own in table.groupby(keys, sort=False, dropna=False):
        row: dict[Hashable, Any] = dict(zip(keys, key, strict=True))
        for name in ("documents", "empty"):
            if name in own:
                row[name] = int(own[name].max())
        for found in own.to_dict("records"):
            for end in ("", "_low", "_high"):
                row[f"{found['metric']}{end}"] = found[f"value{end}"]
            row[f"{found['metric']}_spread"] = found.get("seed_spread")
        rows.append(row)
    return pd.DataFrame(rows)


def ordered(metrics: Iterable[str]) -> list[str]:
    """Metrics in the order in which tables show them; those that are not described come last."""
    return sorted(dict.fromkeys(metrics), key=lambda name: ORDER.get(name, len(ORDER)))


def visible(text: str) -> str:
    """The text with a mark for every invisible character: control characters, turns of direction."""
    return "".join(
        c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


# Corpus and training


def corpus_tables(corpus: Corpus, nearest: int = 1) -> list[Table]:
    """Sizes by split, quantiles of sentence lengths, and actions with the sentences nearest to each."""
    split = sizes(corpus)
    split.loc["all"] = split.sum()
    lengths = sentence_lengths(corpus)
    quantiles = pd.DataFrame(
        [[f"{value:.0f}" for value in lengths]], columns=[f"{q:.0%}" for q in lengths.index]
    )
    actions = action_table(corpus, nearest)
    top = actions.head(SHOWN_ACTIONS)
    rarer = len(actions) - len(top)
    left_out = f"; {rarer:,} rarer ones are left out" if rarer > 0 else ""
    caption = f"Actions ({corpus.k:,}) by training sentences, with the sentences nearest to each{left_out}"
    histogram = pd.DataFrame(
        {
            "action": top.index.astype(str),
            "sentences": top.sentences.map("{:,}".format),
            "share": top["share"].map("{:.1%}".format),
            "": ("█" * round(12 * share / actions["share"].max()) for share in top["share"]),
            "nearest sentences": ("\n".join(map(shortened, texts)) for texts in top["nearest"]),
        },
        dtype="str",
    )
    return [
        display("Corpus by split", split.reset_index(names="split"), ["split", *sizes(corpus).columns]),
        Table("Sentence lengths in tokens, by quantile", quantiles),
        Table(caption, histogram, folded=True),
    ]


def shortened(text: str) -> str:
    """A sentence, its end cut off where it is too long to be shown."""
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def stages_table(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    """The finished stages of a run, by name as in its run.json."""
    names = ("seconds", "parameters", "tuned_parameters", "precision", "taken_from")
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
        f"{accuracy.chance.iloc[0]:.3f} ({INTERVALS})"
    )
    return [display(caption, accuracy, ["variant", "accuracy"]), *_differences("accuracy", differences)]


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


def probe_tables(table: pd.DataFrame, best: pd.DataFrame) -> list[Table]:
    """The best cells, and the baselines and ceilings at the same distances and horizons.

    Args:
        table: All rows of `probekit probe`.
        best: Its best cells.
    """
    cells = best.sort_values(["horizon", "variant", "location", "solver", "seed"])
    examples = int(table.examples[table.accuracy.notna()].max())
    keys = ["target", "variant", "location", "solver", "layer", "distance", "horizon", "seed"]
    caption = (
        f"Best cells, chosen on validation documents, on {examples:,} test examples of "
        f"{int(table.documents.max()):,} documents"
    )
    metrics = ["accuracy", "bits", "gain", "gain_over", "selectivity", "compression"]
    beside = table[table.reader != "probe"].merge(best[["distance", "horizon"]].drop_duplicates())
    return [
        display(
            caption, cells, [*keys, *metrics], optional=["target", "solver", "horizon", "seed", *metrics[-2:]]
        ),
        display(
            "Baselines and ceilings at the distances and horizons of these cells, on the same examples",
            beside.sort_values(["horizon", "distance"], kind="stable"),
            ["reader", "distance", "horizon", "seed", "accuracy", "bits"],
            optional=["seed"],
        ),
    ]


def probe_notes(probes: pd.DataFrame) -> Iterator[str]:
    """How many probes read more than the strongest baseline that needs no model."""
    compared = probes[probes.gain_low.notna() & ~probes.injected]
    if len(compared):
        better = (compared.gain_low > 0.0).groupby(compared.variant).agg(["sum", "count"])
        each = ", ".join(f"{variant} {won} of {of}" for variant, won, of in better.itertuples())
        yield (
            f"{better['sum'].sum():,} of {len(compared):,} cells read more than the "
            f"{' or '.join(sorted(compared.gain_over.unique()))}, 95 % for all together ({each})"
        )


def unreliable_probes(probes: pd.DataFrame) -> Iterator[str]:
    """How many cells are empty, how many have constant activations, and how many probes did not converge."""
    empty = probes[probes.accuracy.isna()]
    if len(empty):
        where = "; ".join(
            f"distance {', '.join(map(str, sorted(cells.distance.unique())))} of horizon {horizon}"
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
        A row for every variant, location, solver, horizon, seed and step, at the nearest distance.
    """
    probes = table[(table.reader == "probe") & table.accuracy.notna()]
    near = probes[probes.distance == probes.distance.min()]
    keys = ["variant", "location", "solver", "horizon", "seed", "step"]
    return near.loc[near.groupby(keys).validation_cross_entropy.idxmin()].sort_values(keys, kind="stable")


def over_training_table(table: pd.DataFrame, stage: str) -> Table:
    """The best layer after each step of a stage whose checkpoints were probed."""
    best = best_by_step(table)
    keys = ["variant", "location", "solver", "horizon", "seed"]
    return display(
        f"Best layer after each step of {stage}, chosen on validation documents, at distance "
        f"{best.distance.min()}, on {int(best.documents.max()):,} test documents ({INTERVALS})",
        best,
        [*keys[:3], "step", "layer", *keys[3:], "accuracy", "bits", "gain", "gain_over"],
        optional=keys,
    )


# Interventions and subnetworks


def intervention_tables(table: pd.DataFrame, *, folded: bool = False) -> list[Table]:
    """What interventions of one variant do: a table for each kind, and two that compare kinds."""
    condition = table.condition + table.strength.map(" × {:g}".format).where(table.strength.notna(), "")
    marks = table.readout_direct.map({True: "*", False: ""}) + table.injected.map({True: "+", False: ""})
    layer = table.location.map(label) + " " + table.layer.astype("Int64").astype("str")
    rows = table.assign(condition=condition, layer=layer.where(table.layer.notna(), "") + marks)
    losses = "losses in nats a token, and the probability that the last layer's probe gives the true action"
    kinds = rows.groupby("kind", sort=False)
    parts = [
        *((f"{kind}: changes of {losses}", own, EFFECTS) for kind, own in kinds),
        ("Accuracy of a linear probe where actions were erased", rows, ERASURE),
        ("Share of sentences written anew that have the action aimed at", rows, STEERING),
    ]
    distances = sorted(table.distance.unique())
    where = f"variant {table.variant.iloc[0]}, distance {', '.join(map(str, distances))} ({INTERVALS})"
    keys = ["kind", "layer", "condition", "distance"]
    tables = []
    for caption, own, metrics in parts:
        found = own[own.metric.isin(metrics)]
        measured = found[found.metric == metrics[0]][["kind", "condition"]].drop_duplicates()
        if len(measured):
            wide = by_metric(found.merge(measured), keys)
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
        "documents: changes of the next sentence's losses in nats a token, bits over the prior that the "
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
