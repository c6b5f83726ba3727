"""What the figures of depth ensembles share: runs, styles of layers, training curves, evaluations.

Layers are numbered from the end, as in metrics.jsonl: -1 is the last one. So a layer has the same name and
colour whatever the LM and however many layers an ensemble has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shared.script import Groups, add_training_options, runs_in, save_figure, script_parser, training_config
from shared.seeds import differences_over_seeds

from probekit.config import MemberName
from probekit.errors import ProbekitError
from probekit.models.depth_ensemble import MEMBERS
from probekit.run.run import Run
from probekit.statistics import over_seeds
from probekit.sweeps import sweep

TUNINGS = ("frozen", "lora", "full")

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
"""Colours of layers, from the last one on (Okabe and Ito's); more layers repeat them dashed, then dotted."""

MEMBER_STYLES = {
    "plain": {"color": "0.6", "linestyle": "--"},
    "repeated": {"color": "#8c6d31", "linestyle": "-"},
    "ensemble": {"color": "black", "linestyle": "-"},
    "distilled": {"color": "#c03a76", "linestyle": "--"},
}

PAIRS = (("ensemble", "plain"), ("ensemble", "repeated"), ("distilled", "ensemble"))
"""Members that are compared: the second is subtracted from the first."""

QUANTITIES = ("ensemble_loss", "sparsity", "layer_loss", "weight")
"""What is logged in training, the last two for every layer."""


def layer_name(number: int) -> str:
    """Returns the name of a layer, given its number from the end."""
    return "last layer" if number == -1 else f"last layer − {-1 - number}"


def layer_style(number: int) -> dict[str, Any]:
    """Returns colour and line style of a layer, given its number from the end."""
    turn, place = divmod(-1 - number, len(COLOURS))
    return {"color": COLOURS[place], "linestyle": ("-", "--", ":")[turn % 3]}


# Runs


def depth_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Makes the parser of a script that reads runs, or trains them from a preset first."""
    parser = script_parser(description, f"figures/{name}.png")
    parser.add_argument("folders", nargs="*", type=Path, help="runs, or sweeps over seeds")
    add_training_options(parser, "runs/depth", preset=None, seeds=3)
    parser.add_argument(
        "--tunings",
        nargs="+",
        choices=TUNINGS,
        default=TUNINGS,
        help="with --preset, into RUNS/PRESET: values of training.base.tuning",
    )
    return parser


def depth_runs(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Groups:
    """Returns the evaluated runs that the options of `depth_parser` ask for; trains what is missing.

    Raises:
        ProbekitError: A folder is no run or sweep, or has no depth ensemble.
    """
    groups: Groups = {}
    parts = [runs_in(folder) for folder in given.folders]
    if given.preset:
        config, seeds = training_config(given)
        members = {name: {"training.base.tuning": name} for name in given.tunings}
        folder = given.runs / given.preset
        sweep(config.override({"method": "depth-ensemble"}), members, seeds, folder)
        parts.append(runs_in(folder, members))
    if not parts:
        parser.error("give sweeps or runs, or --preset to train one")
    for part in parts:
        if same := groups.keys() & part.keys():
            raise ProbekitError(f"several folders are called {same.pop()}; give them names of their own")
        groups |= part
    for runs in groups.values():
        for run in runs:
            check_method(run)
    return groups


def check_method(run: Run) -> None:
    """Refuses a run that has no depth ensemble."""
    if run.config.method != "depth-ensemble":
        raise ProbekitError(
            f"{run.folder} is a run by method {run.config.method}, which has no depth ensemble; make one "
            "with `probekit train --method depth-ensemble`"
        )


def members_of(run: Run, *, reads: Sequence[str], needed: str) -> list[MemberName]:
    """Returns the members of a run that read certain layers, all of them trained.

    Args:
        run: The run.
        reads: Which layers, as `Member.reads`.
        needed: What the figure needs, for the error.

    Raises:
        ProbekitError: There is none, or one is not trained.
    """
    found: list[MemberName] = [m for m in run.config.depth.members if MEMBERS[m].reads in reads]
    if not found or run.config.depth.layers == 1:
        of_one = f"depth.layers {run.config.depth.layers}"
        members = f"depth.members {', '.join(run.config.depth.members)}"
        raise ProbekitError(f"{run.folder} has {of_one if found else members}; the figure needs {needed}")
    for member in found:
        run.require(f"depth/{member}")
    return found


# Training curves


def training_curves(runs: Sequence[Run], member: MemberName, window: int) -> pd.DataFrame:
    """Collects what was logged in the training of a member.

    Args:
        runs: Runs that differ in their seed.
        member: The member.
        window: Logged rows in a centred moving average, shorter at both ends.

    Returns:
        Columns `quantity` (one of `QUANTITIES`), `layer` (from the end; missing for all together), `seed`
        (missing for the mean over seeds, of the steps that all have), `step`, `value` and `smoothed`.

    Raises:
        ProbekitError: A run has no such losses.
    """
    parts = []
    for run in runs:
        run.require(f"depth/{member}")
        metrics = run.metrics()
        rows = metrics[metrics.stage == f"depth/{member}"]
        rows = rows[rows.ensemble_loss.notna()] if "ensemble_loss" in rows else rows[:0]
        if not len(rows):
            raise ProbekitError(
                f"{run.folder / 'metrics.jsonl'} has no losses of depth/{member}; train that stage again"
            )
        columns = [column for column in rows if str(column).startswith(("step", *QUANTITIES))]
        parts.append(rows[columns].assign(seed=run.config.seed))
    long = (
        pd.concat(parts, ignore_index=True).melt(["seed", "step"], var_name="column").dropna(subset="value")
    )
    means = long.groupby(["column", "step"], sort=False).value.agg(["mean", "size"]).reset_index()
    means = means[means["size"] == len(runs)].rename(columns={"mean": "value"}).drop(columns="size")
    long = pd.concat([long, means], ignore_index=True).astype({"seed": "Int64"})
    lines = long.groupby(["column", "seed"], sort=False, dropna=False).value
    smoothed = lines.transform(lambda values: values.rolling(window, center=True, min_periods=1).mean())
    names = long.pop("column").str.extract(r"(.*?)(-\d+)?$")
    table = long.assign(smoothed=smoothed, quantity=names[0], layer=names[1].astype("Int64"))
    return table[["quantity", "layer", "seed", "step", "value", "smoothed"]]


def draw_curve(axes: Axes, rows: pd.DataFrame, name: str, style: Mapping[str, Any]) -> None:
    """Draws one line of `training_curves`: the mean over seeds and, of several, each seed as a thin line."""
    seeds = [seed for _, seed in rows[rows.seed.notna()].groupby("seed")]
    for seed in seeds if len(seeds) > 1 else ():
        axes.plot(seed.step, seed.smoothed, **style, linewidth=0.6, alpha=0.5, label="_seed")
    mean = rows[rows.seed.isna()]
    axes.plot(mean.step, mean.smoothed, **style, linewidth=1.7, label=name)


def draw_over_steps(
    name: str,
    description: str | None,
    measured: Callable[[Groups, int], pd.DataFrame],
    draw: Callable[[pd.DataFrame], Figure],
) -> None:
    """Runs a script that draws curves over training steps: trains what is missing, draws, saves.

    Args:
        name: The name of the script and of its picture.
        description: Its help.
        measured: Returns the numbers of some runs, given the window of a moving average.
        draw: Draws them.
    """

    def window(word: str) -> int:
        if not word.isdecimal() or int(word) < 1:
            raise argparse.ArgumentTypeError(f"{word!r} must be a whole number, 1 or more")
        return int(word)

    parser = depth_parser(description, name)
    parser.add_argument(
        "--window", type=window, default=9, help="logged rows in a moving average (9); 1 for none"
    )
    given = parser.parse_args()
    groups = depth_runs(given, parser)
    table = measured(groups, given.window)
    means = table[table.seed.isna()].drop(columns="seed")
    last = means.groupby(["runs", "member", "quantity", "layer"], sort=False, dropna=False).tail(1)
    settings = {"preset": given.preset, "window": given.window}
    save_figure(draw(table), table, given.out, settings, [*chain(*groups.values())], last)


# Evaluations


def sums_of(runs: Sequence[Run]) -> pd.DataFrame:
    """Collects losses and solved questions: `metric`, `name`, `seed`, `document`, `sum` and `count`.

    Raises:
        ProbekitError: A run is not evaluated.
    """
    parts = []
    for run in runs:
        losses = run.corpus.by_group(run.losses()).rename(columns={"loss": "sum", "tokens": "count"})
        choices = run.choices()
        if run.config.evaluation.questions_file is None:  # else documents are lines of the file
            choices = run.corpus.by_group(choices)
        solved = choices.groupby(["variant", "document"], sort=False).solved.agg(["sum", "count"])
        both = losses.assign(metric="perplexity"), solved.reset_index().assign(metric="accuracy")
        parts += [part.assign(seed=run.config.seed, name=part.variant) for part in both]
    return pd.concat(parts, ignore_index=True)[["metric", "name", "seed", "document", "sum", "count"]]


def values_of(sums: pd.DataFrame, *, resamples: int) -> pd.DataFrame:
    """Returns perplexities and accuracies of each seed and over all seeds; see `over_seeds`."""
    return over_seeds(sums, ["metric", "name"], {"perplexity": np.exp}, resamples=resamples, seed=0)


def differences_of(sums: pd.DataFrame, pairs: Sequence[tuple[str, str]], *, resamples: int) -> pd.DataFrame:
    """Returns differences of perplexities and accuracies, paired over documents; see `over_seeds`.

    Args:
        sums: As from `sums_of`; every name has the same seeds.
        pairs: Names; the second's value is subtracted from the first's.
        resamples: Number of resamples of documents.

    Returns:
        Columns `metric`, `first` and `second`, and those of `over_seeds`.
    """
    losses = sums[sums.metric == "perplexity"].rename(columns={"sum": "loss", "count": "tokens"})
    perplexity = differences_over_seeds(losses, pairs, resamples=resamples, seed=0)
    perplexity = perplexity.drop(columns="below").assign(metric="perplexity")
    answers = sums[sums.metric == "accuracy"]
    by_name = answers.pivot_table("sum", ["seed", "document"], "name", aggfunc="sum")
    asked = answers.groupby(["seed", "document"])["count"].first()
    # Accuracy is linear in the sums, so a difference of ratios is the ratio of the differences.
    differences = [
        pd.DataFrame({"sum": by_name[first] - by_name[second], "count": asked})
        .reset_index()
        .assign(first=first, second=second, metric="accuracy")
        for first, second in pairs
    ]
    keys = ["metric", "first", "second"]
    accuracy = over_seeds(pd.concat(differences), keys, {}, resamples=resamples, seed=0)
    return pd.concat([perplexity, accuracy], ignore_index=True)[list(accuracy.columns)]
