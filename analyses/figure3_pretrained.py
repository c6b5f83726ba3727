"""Figure 3 on real text: what pre-trained LMs know of the topics of the sentences ahead.

    python analyses/figure3_pretrained.py ARTICLES.jsonl --models LM [LM ...]

The text is read as the preset `smollm2-wikipedia` says: the opening sentences of articles, clustered into
actions by their embeddings. For each LM, and for the same architecture with random weights, probes read the
action of the sentences ahead, in layers spread over the depth, at some tokens before the next sentence. A
planner is trained on the embeddings of the sentences so far, and counted on nothing else.

Above, gain over the strongest baseline that needs no model, by layer and distance, of the next sentence; a
dot marks cells whose interval, which holds for all cells of the LM, is above zero. In the middle, bits over
the prior by how many sentences ahead, right before the next one: the layer that is best on validation
documents for each, beside what counting knows and the planner. Below, readers of the next action against a
mixture of four readers of the text (planner, embeddings of sentences, bigram, bag of words): log-linear
mixtures, their weights fitted on validation documents. The action's bits are those of whether it stays and of
which other it is. All examples are followed by three more sentences. Intervals resample articles.

What is finished is kept: the next call with the same text and LMs goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import log_softmax
from shared.script import layers_over, made_of, names_of, run_script, save_figure, script_parser

import probekit
from probekit.config import Config, reading_order
from probekit.data.corpus import Corpus
from probekit.evaluation.action_metrics import fit_bigram, prior_log_probabilities
from probekit.evaluation.baselines import planner_log_probabilities
from probekit.probing.activations import ActivationReader
from probekit.probing.baselines import BAG_PENALTIES, MOST_BAGS, bags_of_words, counted_examples
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON, Grid, make_grid
from probekit.probing.record import read_probe_record
from probekit.probing.results import SavedProbes, cells_of, validation_loss
from probekit.probing.solvers import RidgeProbes, SoftmaxProbes
from probekit.probing.targets import Examples, find_target
from probekit.reports.colours import colour_bar, colours_of_names
from probekit.reports.drawing import draw_intervals, draw_line
from probekit.reports.plot_probes import (
    BASELINE_STYLES,
    METRIC_LABELS,
    Panel,
    draw_heat_map,
    mean_over_seeds,
    probe_scale,
)
from probekit.run.folder import digest_of
from probekit.run.run import Run
from probekit.statistics import bootstrap_ratio, sum_groups

LOCATION = "hook_resid_post"
DISTANCES = (1, 2, 4, 8)
HORIZONS = (1, 2, 3, 4)

BESIDE = ("planner", "bag of words", "bigram (current action)", "skip n-gram", "token embedding")
"""Readers that are drawn beside the probes."""

L2 = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties tried in softmax regression."""

TEXT = ("planner", "sentences", "bigram", "words")

READERS = {
    "counts": ("bigram", "words"),
    "planner": ("planner",),
    "text": TEXT,
    "probe": ("probe",),
    "text, random weights": (*TEXT, "random"),
    "text, probe": (*TEXT, "probe"),
}
"""What is compared in `together`, and what each is a mixture of."""

PARTS = {"action": "the action", "stays": "whether it stays", "other": "which other"}

KEPT = ["lm", "reader", "variant", "seed", "layer", "distance", "horizon", "examples", "documents"]
METRICS_KEPT = ("accuracy", "cross_entropy", "bits", "gain", "over_planner", "selectivity")


def probed(model: str, folder: Path, given: argparse.Namespace) -> Run:
    """Trains the planner and probes an LM, unless that is finished."""
    made_of(folder, f"{digest_of([given.text])} {given.encoder} {given.documents} {given.layers} {model}")
    config = Config.from_preset("smollm2-wikipedia").override(
        {
            "lm.name": model,
            "corpus.reader": "auto",
            "corpus.path": given.text,
            "corpus.max_documents": given.documents,
            "actions.encoder": given.encoder,
            "mixing.variants": ["none"],
            "evaluation.window": None,
            "evaluation.stride": None,
        }
    )
    run = probekit.train(config, folder / "run", existing="resume")
    depth = run.frozen_lm().layers
    settings = {
        "probe.layers": layers_over(depth, given.layers),
        "probe.positions": DISTANCES,
        "probe.horizons": HORIZONS,
        "probe.code_length": False,
    }
    if not (run.folder / "probes" / "results.parquet").exists():
        probekit.probe(run, settings)
    return run


def best_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Of each LM, variant and horizon, the cell at the nearest distance that validation documents choose."""
    cells = table[(table.reader == "probe") & (table.distance == 1)]
    chosen = validation_loss(cells).groupby([cells.lm, cells.variant, cells.horizon]).idxmin()
    return table.loc[chosen]


def mixture(parts: Sequence[np.ndarray], weights: ArrayLike) -> np.ndarray:
    """The log-linear mixture of log-probabilities `[examples, classes]`; no probability is below e^-30."""
    scores = sum(
        weight * np.maximum(part, -30.0) for weight, part in zip(np.asarray(weights), parts, strict=True)
    )
    return np.asarray(log_softmax(scores, axis=1))


def mixture_weights(parts: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """The weights of the log-linear mixture that tells labels `[examples]` best."""

    def loss(weights: np.ndarray) -> float:
        return float(-mixture(parts, weights)[np.arange(len(labels)), labels].mean())

    return np.asarray(minimize(loss, np.full(len(parts), 1 / len(parts)), method="Nelder-Mead").x)


def sentence_features(corpus: Corpus, examples: Examples) -> np.ndarray:
    """The embedding of the sentence before each one, and the mean of all so far `[examples, features]`."""
    first, sentence = corpus.document_sentences[examples.document], examples.sentence
    embeddings = np.asarray(corpus.embeddings, np.float64)
    sums = np.concatenate([np.zeros_like(embeddings[:1]), embeddings.cumsum(axis=0)])
    mean = (sums[sentence] - sums[first]) / (sentence - first)[:, None]
    return np.hstack([embeddings[sentence - 1], mean])


def regressed(
    probes: SoftmaxProbes | RidgeProbes,
    features: Callable[[Examples], np.ndarray],
    fitted_on: Examples,
    grid: Grid,
    classes: int,
) -> dict[str, np.ndarray]:
    """Log-probabilities of the next action by split, from a linear reader of some features."""

    def read(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(features(examples)).float()[None], torch.from_numpy(examples.labels[:, 0])

    asked = {split: read(grid.examples[split]) for split in (CHOSEN_ON, TESTED_ON)}
    probes.fit(*read(fitted_on), classes, *asked[CHOSEN_ON])
    return {split: probes.log_probabilities(X)[0].double().numpy() for split, (X, _) in asked.items()}


def probe_readings(run: Run, row: pd.DataFrame, grid: Grid) -> dict[str, np.ndarray]:
    """Log-probabilities by split that the probe of a row of the table of results reads."""
    (cell,), variant = cells_of(row), row.variant.iloc[0]
    probe = SavedProbes(run.folder / "probes", variant, int(row.seed.iloc[0]))[cell]
    reader = ActivationReader(
        run, variant, [(cell.location, cell.layer)], [cell.position], int(row.seed.iloc[0])
    )
    found = {}
    for split in (CHOSEN_ON, TESTED_ON):
        read = torch.cat([stacks[0][0, 0] for _, stacks in reader.chunks(grid.examples[split])])
        found[split] = probe.log_probabilities(read).double().numpy()
    return found


def by_part(said: np.ndarray, true: np.ndarray, before: np.ndarray) -> dict[str, np.ndarray]:
    """Log-probabilities of what happened, whose sum is that of the action: NaN where nothing is asked.

    Args:
        said: Log-probabilities `[examples, actions]`.
        true: The next sentence's action `[examples]`.
        before: The action of the sentence before it `[examples]`.

    Returns:
        `action`; `stays`, whether it is the action before; `other`, which one it is of all others, where it
        is another. Parts chosen by what happened would reward whoever gives the action before less weight.
    """
    rows = np.arange(len(true))
    action, stay = said[rows, true], np.where(before < 0, -np.inf, np.minimum(said[rows, before], -1e-12))
    leave = np.log(-np.expm1(stay))
    same = true == before
    return {
        "action": action,
        "stays": np.where(same, stay, leave),
        "other": np.where(same, np.nan, action - leave),
    }


def together(run: Run, best: pd.DataFrame) -> pd.DataFrame:
    """What the best probe of the next sentence adds to readers of the text so far.

    These are the planner, the bigram, a ridge probe of the bag of words, and softmax regression on the
    embeddings of `sentence_features`, mixed. Readers of one text err apart and are better together, so that
    the probe of random weights is added to them, too. Bigram and bag of words are counted on all
    documents that no choice and no test uses, the planner is trained on those that no probe has seen; the
    regression has the probes' own examples.

    Args:
        run: A run with a planner and probes.
        best: The rows of the table of results of the best probe of each variant.

    Returns:
        A row for each reader of `READERS` and part of `PARTS` (see `by_part`). `value` is in bits over the
        prior; `over_counts`, `over_planner` and `over_text` are the paired differences from these readers.
    """
    settings, corpus = read_probe_record(run.folder).config.probe, run.corpus
    target = find_target(corpus, "action")
    grid = make_grid(corpus, settings, target, run.config.seed)
    counted, fitted_on = counted_examples(corpus, settings, grid, run.config.seed), grid.examples[FITTED_ON]
    splits = {split: grid.examples[split] for split in (CHOSEN_ON, TESTED_ON)}
    labels = {split: examples.labels[:, 0] for split, examples in splits.items()}

    def before(examples: Examples) -> np.ndarray:
        return corpus.previous_labels(corpus.known_actions, examples.sentence)

    chosen_on = splits[CHOSEN_ON]
    bigram = fit_bigram(
        before(counted),
        counted.labels[:, 0],
        target.classes,
        (before(chosen_on), labels[CHOSEN_ON]),
    )
    planned = {}
    for split, examples in splits.items():
        documents = np.unique(examples.document)
        row = np.searchsorted(corpus.sentences(documents), examples.sentence)
        planned[split] = planner_log_probabilities(run.planner(), corpus, documents)[row]
    fit = partial(regressed, grid=grid, classes=target.classes)
    said = {
        "planner": planned,
        "bigram": {split: bigram.log_probabilities(before(own)) for split, own in splits.items()},
        "words": fit(
            RidgeProbes(BAG_PENALTIES),
            lambda own: bags_of_words(corpus, own, own.start - 1),
            counted[:: -(-len(counted) // MOST_BAGS)],
        ),
        "sentences": fit(SoftmaxProbes(L2), partial(sentence_features, corpus), fitted_on),
        "probe": probe_readings(run, best[best.variant == "none"], grid),
        "random": probe_readings(run, best[best.variant == "random"], grid),
    }
    test, true = splits[TESTED_ON], labels[TESTED_ON]
    prior = np.tile(prior_log_probabilities(counted.labels[:, 0], target.classes), (len(true), 1))
    nothing = by_part(prior, true, before(test))
    bits = {}
    for name, mixed in READERS.items():
        weights = mixture_weights([said[one][CHOSEN_ON] for one in mixed], labels[CHOSEN_ON])
        parts = by_part(mixture([said[one][TESTED_ON] for one in mixed], weights), true, before(test))
        bits[name] = {part: (values - nothing[part]) / np.log(2) for part, values in parts.items()}
    rows = []
    for part in PARTS:
        asked = np.isfinite(nothing[part])
        group = pd.factorize(test.document[asked])[0]
        counts = sum_groups(group, np.ones(len(group)))
        for name, own in bits.items():
            facts = {"reader": name, "part": part, "examples": len(group)}
            beside = {f"over_{other}": bits[other][part] for other in ("counts", "planner", "text")}
            for column, over in {"value": np.zeros(len(true)), **beside}.items():
                sums = sum_groups(group, (own[part] - over)[asked])
                facts |= bootstrap_ratio(sums, counts, resamples=2000, seed=0).columns(column)
            rows.append(facts)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, beyond: pd.DataFrame) -> Figure:
    """Draws a column for each LM: the grid, readers by horizon, and `together`."""
    lms = list(table.lm.unique())
    figure = Figure(figsize=(5.6 * len(lms), 10.8), layout="constrained")
    top, bottom, last = figure.subfigures(3, 1, squeeze=False, height_ratios=[1.1, 1.0, 1.1])[:, 0]
    grid = top.subplots(1, 2 * len(lms), squeeze=False)
    shown = [(lm, variant) for lm in lms for variant in ("none", "random")]
    cells = [Panel(variant, LOCATION).cells(table[table.lm == lm]) for lm, variant in shown]
    means = [mean_over_seeds(one, "gain") for one in cells]
    scale = probe_scale(means, "gain")
    for axes, (lm, variant), own, mean in zip(grid.flat, shown, cells, means, strict=True):
        draw_heat_map(axes, own, "gain", scale, numbers=False)
        columns, layers = reading_order(mean.position), sorted(mean.layer.unique(), reverse=True)
        above = mean[mean.low > 0]
        x = [columns.index(position) + 0.5 for position in above.position]
        y = [layers.index(layer) + 0.5 for layer in above.layer]
        axes.plot(x, y, ".", color="black", markersize=3)
        axes.set(xlabel="", ylabel="")
        axes.set_title(f"{lm}\n{'random weights' if variant == 'random' else 'its weights'}", fontsize=9)
        axes.tick_params(labelsize=7)
    top.supxlabel("distance: tokens before the next sentence", fontsize=9)
    top.supylabel("layer", fontsize=9)
    colour_bar(top, grid, scale, pd.concat(means).value, "bits over the strongest\nbaseline without a model")
    best = best_cells(table)
    panels = bottom.subplots(1, len(lms), squeeze=False, sharey=True)
    for axes, lm in zip(panels.flat, lms, strict=True):
        of_lm, beside = best[best.lm == lm], table[(table.lm == lm) & (table.distance == 1)]
        for variant, colour in zip(("none", "random"), colours_of_names(2), strict=True):
            rows = of_lm[of_lm.variant == variant].sort_values("horizon")
            name = "probe" if variant == "none" else "probe, random weights"
            values = rows.rename(columns={"bits": "value", "bits_low": "low", "bits_high": "high"})
            draw_line(axes, values, "horizon", name, colour)
        for reader in BESIDE:
            colour, style = BASELINE_STYLES[reader]
            rows = beside[(beside.reader == reader) & beside.bits.notna()].sort_values("horizon")
            rows = rows.drop_duplicates("horizon")
            axes.plot(rows.horizon, rows.bits, style if len(rows) > 1 else "D", color=colour, label=reader)
        axes.axhline(0.0, color="0.7", linewidth=0.8)
        axes.set_xticks(HORIZONS)
        axes.set_xlabel("sentences ahead", fontsize=9)
        axes.set_title(f"{lm}: {int(beside.documents.max())} articles", fontsize=9)
    panels.flat[0].set_ylabel(METRIC_LABELS["bits"])
    handles, names = panels.flat[0].get_legend_handles_labels()
    bottom.legend(handles, names, loc="outside lower center", ncols=2 + len(lms), fontsize=8, frameon=False)
    for axes, lm in zip(last.subplots(1, len(lms), squeeze=False, sharex=True).flat, lms, strict=True):
        rows = beyond[(beyond.lm == lm) & (beyond.reader != "text")]
        rows = rows.assign(name=rows.part.map(PARTS) + ": " + rows.reader, seed=np.nan)
        renamed = {f"over_text{bound}": f"value{bound}" for bound in ("", "_low", "_high")}
        rows = rows[["name", "seed", *renamed]].rename(columns=renamed)
        draw_intervals(axes, rows, list(rows.name))
        axes.axvline(0.0, color="0.4", linewidth=0.8)
        axes.set_xlabel("bits over the readers of the text together", fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Probes what is not probed yet, draws, saves."""
    parser = script_parser(__doc__, "figures/figure3_pretrained.png")
    parser.add_argument("text", type=Path, help="texts, such as JSON lines with a column `text`")
    parser.add_argument("--models", nargs="+", required=True, help="hub names or folders of LMs")
    parser.add_argument(
        "--encoder",
        default="sentence-transformers/all-MiniLM-L6-v2",
        help="sentence encoder (sentence-transformers/all-MiniLM-L6-v2)",
    )
    parser.add_argument("--documents", type=int, default=6100, help="at most so many texts (6100)")
    parser.add_argument("--layers", type=int, default=11, help="how many layers, over the depth (11)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/figure3_pretrained"), help="folder of the runs"
    )
    given = parser.parse_args(arguments)
    names = names_of(given.models)
    runs = [probed(model, given.runs / name, given) for model, name in zip(given.models, names, strict=True)]
    found = [run.probes().assign(lm=name) for run, name in zip(runs, names, strict=True)]
    table = pd.concat(found, ignore_index=True)
    best = best_cells(table)
    of_next = best[best.horizon == 1]
    beyond = pd.concat(
        [
            together(run, of_next[of_next.lm == name]).assign(lm=name)
            for run, name in zip(runs, names, strict=True)
        ],
        ignore_index=True,
    )
    bounds = [f"{metric}{bound}" for metric in METRICS_KEPT for bound in ("", "_low", "_high")]
    numbers = table[[*KEPT, *bounds, "gain_over", "validation_cross_entropy", "l2", "tokens_read"]]
    settings = {"documents": given.documents, "layers": given.layers, "models": names}
    numbers = pd.concat([numbers, beyond.assign(variant="none", distance=1, horizon=1)], ignore_index=True)
    shown = best[["lm", "variant", "horizon", "layer", *bounds[6:15]]]
    save_figure(draw(table, beyond), numbers, given.out, settings, runs, shown)


if __name__ == "__main__":
    run_script(main)
