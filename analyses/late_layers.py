"""What the figures of depth ensembles share: the runs they read, colours, training curves, what was measured.

Layers are numbered from behind, as in metrics.jsonl: -1 is the last one. So a layer has the same name and
colour whatever the LM and however many layers an ensemble has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from manifest import save_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scripts import add_training_options, script_parser, training_config

from probekit.config import MemberName
from probekit.errors import ProbekitError
from probekit.models.depth_ensemble import MEMBERS
from probekit.run.run import Run
from probekit.statistics import differences_over_seeds, over_seeds
from probekit.sweeps import Sweep, sweep

Groups = dict[str, list[Run]]
"""Runs by name, those of a name differing in their seed alone."""

TUNINGS = ("frozen", "lora", "full")

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
"""Of layers, from the last one on (Okabe and Ito's); behind them they come again, dashed, then dotted."""

MEMBER_STYLES = {
    "plain": {"color": "0.6", "linestyle": "--"},
    "repeated": {"color": "#8c6d31", "linestyle": "-"},
    "ensemble": {"color": "black", "linestyle": "-"},
    "distilled": {"color": "#c03a76", "linestyle": "--"},
}
"""Colour and line of each member."""

PAIRS = (("ensemble", "plain"), ("ensemble", "repeated"), ("distilled", "ensemble"))
"""Members that are compared: the second is taken from the first."""

QUANTITIES = ("ensemble_loss", "sparsity", "layer_loss", "weight")
"""What is logged in training, the last two for every layer."""


def layer_name(number: int) -> str:
    """What a layer is called, given its number from behind."""
    return "last layer" if number == -1 else f"last layer − {-1 - number}"


def layer_style(number: int) -> dict[str, Any]:
    """Colour and line of a layer, given its number from behind."""
    turn, place = divmod(-1 - number, len(COLOURS))
    return {"color": COLOURS[place], "linestyle": ("-", "--", ":")[turn % 3]}


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds which runs a figure is of: folders, or a preset by which they are trained first."""
    parser.add_argument(
        "folders", nargs="*", type=Path, help="runs, or sweeps, whose seeds are taken together"
    )
    add_training_options(parser, "runs/depth", preset=None, seeds=3)
    parser.add_argument(
        "--tunings",
        nargs="+",
        choices=TUNINGS,
        default=TUNINGS,
        help="with --preset, into RUNS/PRESET: values of training.base.tuning",
    )


def depth_runs(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Groups:
    """The evaluated runs that the options of `add_run_options` ask for; what is missing is trained first.

    Raises:
        ProbekitError: A folder is no run or sweep, or has no depth ensemble.
    """
    parts = [_read(folder) for folder in given.folders]
    if given.preset:
        config, seeds = training_config(given)
        members = {name: {"training.base.tuning": name} for name in given.tunings}
        folder = given.runs / given.preset
        sweep(config.override({"method": "depth-ensemble"}), members, seeds, folder)
        parts.append(_read(folder, members))
    if not parts:
        parser.error("give sweeps or runs, or --preset to train one")
    names = [name for part in parts for name in part]
    for name in names:
        if names.count(name) > 1:
            raise ProbekitError(f"several folders are called {name}; give them names of their own")
    groups = {name: runs for part in parts for name, runs in part.items()}
    for runs in groups.values():
        for run in runs:
            check_method(run)
    return groups


def _read(folder: Path, members: Iterable[str] | None = None) -> Groups:
    """The runs of a folder: a single one, or those of a sweep's members."""
    if not Sweep.is_in(folder):
        return {folder.resolve().name: [Run.open(folder)]}
    opened = Sweep.open(folder)
    if not opened.runs:
        raise ProbekitError(f"{folder} has no finished run yet; go on with the command that began it")
    wanted = list(members or dict.fromkeys(place.member for place in opened.runs))
    name = folder.resolve().name
    return {
        name if wanted == [member] and len(opened.members) == 1 else f"{name}, {member}": [
            run for place, run in opened.runs.items() if place.member == member
        ]
        for member in wanted
    }


def check_method(run: Run) -> None:
    """Refuses a run that has no depth ensemble."""
    if run.config.method != "depth-ensemble":
        raise ProbekitError(
            f"{run.folder} is a run by method {run.config.method}, which has no depth ensemble; make one "
            "with `probekit train --method depth-ensemble`"
        )


def require_members(run: Run, members: Sequence[MemberName]) -> None:
    """Refuses a run without some members.

    Raises:
        ProbekitError: The settings have one not; it is not trained.
    """
    for member in members:
        if member not in run.config.depth.members:
            raise ProbekitError(
                f"{run.folder} has depth.members {', '.join(run.config.depth.members)}; "
                f"{member} is needed too"
            )
        run.require(f"depth/{member}")


def members_of(run: Run, *, reads: Sequence[str], needed: str) -> list[MemberName]:
    """The members of a run whose layers are read in some way, all of them trained.

    Args:
        run: The run.
        reads: Ways, as `Member.reads` has them.
        needed: What the figure needs, for the error.

    Raises:
        ProbekitError: It has none; one is not trained.
    """
    found: list[MemberName] = [m for m in run.config.depth.members if MEMBERS[m].reads in reads]
    if not found or run.config.depth.layers == 1:
        of_one = f"depth.layers {run.config.depth.layers}"
        members = f"depth.members {', '.join(run.config.depth.members)}"
        raise ProbekitError(f"{run.folder} has {of_one if found else members}; the figure needs {needed}")
    for member in found:
        run.require(f"depth/{member}")
    return found


def add_window_option(parser: argparse.ArgumentParser) -> None:
    """Adds the window of `training_curves`."""
    parser.add_argument(
        "--window", type=_window, default=9, help="logged rows in a moving average (9); 1 leaves all as it is"
    )


def _window(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} must be a whole number, 1 or more")
    return int(word)


def training_curves(runs: Sequence[Run], member: MemberName, window: int) -> pd.DataFrame:
    """What was logged in the training of a member.

    Args:
        runs: Runs that differ in their seed.
        member: Which member.
        window: Logged rows in a moving average, which is centred, and shorter at both ends.

    Returns:
        Columns `quantity` (one of `QUANTITIES`), `layer` (from behind; missing where all count), `seed`
        (missing for the mean over seeds, of the steps that all have), `step`, `value` and `smoothed`.
    """
    each = pd.concat([_logged(run, member).assign(seed=run.config.seed) for run in runs], ignore_index=True)
    long = each.melt(["seed", "step"], var_name="column").dropna(subset="value")
    means = long.groupby(["column", "step"], sort=False).value.agg(["mean", "size"]).reset_index()
    means = means[means["size"] == len(runs)].rename(columns={"mean": "value"}).drop(columns="size")
    long = pd.concat([long, means], ignore_index=True).astype({"seed": "Int64"})
    lines = long.groupby(["column", "seed"], sort=False, dropna=False).value
    smoothed = lines.transform(lambda values: values.rolling(window, center=True, min_periods=1).mean())
    parts = long.pop("column").str.extract(r"(.*?)(-\d+)?$")
    table = long.assign(smoothed=smoothed, quantity=parts[0], layer=parts[1].astype("Int64"))
    return table[["quantity", "layer", "seed", "step", "value", "smoothed"]]


def draw_line(axes: Axes, rows: pd.DataFrame, name: str, style: Mapping[str, Any]) -> None:
    """One line of `training_curves`: the mean over seeds, and thin, if there are several, each seed."""
    seeds = [seed for _, seed in rows[rows.seed.notna()].groupby("seed")]
    for seed in seeds if len(seeds) > 1 else ():
        axes.plot(seed.step, seed.smoothed, **style, linewidth=0.6, alpha=0.5, label="_seed")
    mean = rows[rows.seed.isna()]
    axes.plot(mean.step, mean.smoothed, **style, linewidth=1.7, label=name)


def _logged(run: Run, member: MemberName) -> pd.DataFrame:
    """What was logged for every few steps; columns `step` and those that begin with `QUANTITIES`."""
    run.require(f"depth/{member}")
    metrics = run.metrics()
    rows = metrics[metrics.stage == f"depth/{member}"]
    rows = rows[rows.ensemble_loss.notna()] if "ensemble_loss" in rows else rows[:0]
    if not len(rows):
        raise ProbekitError(
            f"{run.folder / 'metrics.jsonl'} has no losses of depth/{member}; train that stage again"
        )
    return rows[[column for column in rows if str(column).startswith(("step", *QUANTITIES))]]


def sums_of(runs: Sequence[Run]) -> pd.DataFrame:
    """What perplexity and accuracy are made of: `metric`, `name`, `seed`, `document`, `sum` and `count`.

    Raises:
        ProbekitError: A run is not evaluated.
    """
    parts = []
    for run in runs:
        losses = run.losses().rename(columns={"loss": "sum", "tokens": "count"})
        solved = run.choices().groupby(["variant", "document"], sort=False).solved.agg(["sum", "count"])
        both = losses.assign(metric="perplexity"), solved.reset_index().assign(metric="accuracy")
        parts += [part.assign(seed=run.config.seed, name=part.variant) for part in both]
    return pd.concat(parts, ignore_index=True)[["metric", "name", "seed", "document", "sum", "count"]]


def values_of(sums: pd.DataFrame, *, resamples: int) -> pd.DataFrame:
    """Perplexities and accuracies, each seed's and over all seeds, as `over_seeds` has them."""
    return over_seeds(sums, ["metric", "name"], {"perplexity": np.exp}, resamples=resamples, seed=0)


def differences_of(sums: pd.DataFrame, pairs: Sequence[tuple[str, str]], *, resamples: int) -> pd.DataFrame:
    """Differences of perplexities and accuracies, paired over documents, as `over_seeds` has them.

    Args:
        sums: As of `sums_of`; every name has the same seeds.
        pairs: Names, of which the second's value is taken from the first's.
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
    # Linear in the sums: the ratio of the differences.
    of_pairs = [
        pd.DataFrame({"sum": by_name[first] - by_name[second], "count": asked})
        .reset_index()
        .assign(first=first, second=second, metric="accuracy")
        for first, second in pairs
    ]
    keys = ["metric", "first", "second"]
    accuracy = over_seeds(pd.concat(of_pairs), keys, {}, resamples=resamples, seed=0)
    return pd.concat([perplexity, accuracy], ignore_index=True)[list(accuracy.columns)]


def draw_over_steps(
    name: str,
    description: str | None,
    measured: Callable[[Groups, int], pd.DataFrame],
    draw: Callable[[pd.DataFrame], Figure],
) -> None:
    """A script that draws what was measured over training steps: trains what is missing, draws, saves.

    Args:
        name: The script's, and its picture's.
        description: For its help.
        measured: The numbers of some runs, averaged over a window of steps.
        draw: Draws them.
    """
    parser = script_parser(description, f"figures/{name}.png")
    add_run_options(parser)
    add_window_option(parser)
    given = parser.parse_args()
    groups = depth_runs(given, parser)
    table = measured(groups, given.window)
    path = save_figure(
        draw(table),
        table,
        given.out,
        script=f"analyses/{name}.py",
        settings={"preset": given.preset, "window": given.window},
        runs=[run for runs in groups.values() for run in runs],
    )
    last = table[table.seed.isna()].groupby(["runs", "member", "quantity", "layer"], sort=False, dropna=False)
    print(last.tail(1).drop(columns="seed").to_string(index=False))  # noqa: T201 - a script tells what it found
    print(path)  # noqa: T201
