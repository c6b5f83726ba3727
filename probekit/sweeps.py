"""`probekit sweep`: the same settings with some changed, over seeds; a run for each, no stage trained twice.

OUT/sweep.json        settings, members, seeds
OUT/<member>/seed<N>  a run like any other
OUT/results.parquet   one row for each member, variant, metric and seed, and one over all seeds
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from probekit.config import Config, setting_names, setting_value, unknown_setting, user_path
from probekit.data.corpus import Corpus
from probekit.distributed import compute_device
from probekit.errors import ProbekitError
from probekit.evaluation.evaluate import evaluate
from probekit.evaluation.perplexity import evaluation_record
from probekit.generation.evaluate import TRANSFORMS, by_group, evaluate_generation
from probekit.io import locked, read_json, write_json, write_table
from probekit.progress import Progress
from probekit.run.folder import SWEEP
from probekit.run.run import Run
from probekit.run.stages import stage_settings, stages_of, why_idle
from probekit.statistics import over_seeds
from probekit.training.train import check_new_model, train

Members = Mapping[str, Mapping[str, Any]]
"""Settings by dotted name, for every member by its name."""

FORMAT = 1
"""Version of sweep.json; others are refused."""

KEYS = ["member", "variant", "actions", "texts", "length", "metric"]
"""Columns that identify a metric in the table; `length` in tokens, 0 where texts have their own."""

RESOLVED = {"precision": "training.precision", "dtype": "lm.dtype", "weights": "lm.name"}
"""Facts of a stage that say what a setting amounted to on the machine, and the setting."""

ANY_NUMBER = ("prompts", "batch_size")
"""Settings of generation that may differ from what is recorded: how many there were; speed."""


class Place(NamedTuple):
    """One run of a sweep."""

    member: str
    seed: int

    def __str__(self) -> str:
        return f"{self.member}/seed{self.seed}"


def grid(config: Config, over: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Members for all combinations of the values of some settings, such as `mixing.fraction=0.5`.

    Args:
        config: The settings that they change.
        over: Values by dotted name.

    Raises:
        ProbekitError: A setting does not exist or has no values; a value does not fit it or is given twice.
    """
    for name, values in over.items():
        if name not in setting_names():
            raise unknown_setting(name, setting_names())
        if not values:
            raise ProbekitError(f"{name} has no values to sweep over; give one or more")
    members: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*over.values()):
        config = config.override(dict(zip(over, values, strict=True)))
        settings = {name: setting_value(config, name) for name in over}
        member = ",".join(f"{name}={_in_name(value)}" for name, value in settings.items())
        if member in members:
            raise ProbekitError(f"{member} is given twice; leave one out")
        members[member] = settings
    return members


def _in_name(value: Any) -> str:
    """A setting's value in the name of a folder."""
    if isinstance(value, tuple):
        return "+".join(map(_in_name, value))
    if isinstance(value, bool | None):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else re.sub(r"[^\w.-]", "_", str(value))


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder; an interrupted one can be read as far as it is finished.

    Attributes:
        folder: Where it is.
        config: The settings that members change.
        members: Settings by dotted name for every member by its name.
        seeds: Seeds of every member's runs.
    """

    folder: Path
    config: Config
    members: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path, config: Config, members: Members, seeds: Iterable[int]) -> Sweep:
        """A sweep, with the values of members converted to the settings' types.

        Raises:
            ProbekitError: A setting does not exist, or a value does not fit it.
        """
        typed: dict[str, dict[str, Any]] = {}
        for member, settings in members.items():
            if unknown := [name for name in settings if name not in setting_names()]:
                raise unknown_setting(unknown[0], setting_names())
            changed = config.override(settings)
            typed[member] = {name: setting_value(changed, name) for name in settings}
        return cls(folder, config, typed, tuple(seeds))

    @classmethod
    def open(cls, folder: str | Path) -> Sweep:
        """Opens a sweep's folder.

        Raises:
            ProbekitError: It holds no sweep, or one of another version.
        """
        folder = user_path(folder).absolute()
        if not (folder / SWEEP).is_file():
            what = "does not exist" if not folder.exists() else f"holds no sweep (no {SWEEP})"
            raise ProbekitError(f"{folder} {what}; make one with `probekit sweep ... --out {folder}`")
        record = read_json(folder / SWEEP)
        if record.get("format") != FORMAT:
            raise ProbekitError(f"{folder / SWEEP} is no record of a sweep in format {FORMAT}; sweep again")
        return cls.of(folder, Config.from_dict(record["config"]), record["members"], record["seeds"])

    def write(self) -> None:
        """Writes sweep.json."""
        record = {"format": FORMAT, "config": self.config.model_dump(mode="json")}
        write_json(self.folder / SWEEP, record | {"members": self.members, "seeds": self.seeds})

    @property
    def places(self) -> list[Place]:
        """Its runs, seed by seed, so that an interrupted sweep has all members of the first seeds."""
        return [Place(member, seed) for seed in self.seeds for member in self.members]

    @property
    def settings(self) -> list[str]:
        """The settings that members change."""
        return list(dict.fromkeys(name for settings in self.members.values() for name in settings))

    def config_of(self, place: Place) -> Config:
        """The settings of one run."""
        config = self.config.override({**self.members[place.member], "seed": place.seed})
        return config.with_absolute_paths()

    @cached_property
    def runs(self) -> dict[Place, Run]:
        """The runs that are trained and evaluated.

        Raises:
            ProbekitError: One has other settings than the sweep gives it, or was trained in another
                arithmetic, or on other weights, than another run.
        """
        runs: dict[Place, Run] = {}
        resolved: dict[tuple[str, Any], tuple[Place, str]] = {}
        for place in self.places:
            if not (self.folder / str(place) / "evaluation.json").is_file():
                continue
            run = Run.open(self.folder / str(place))
            for mismatch in _mismatches(run, self.config_of(place)):
                raise ProbekitError(
                    f"{self.folder}: {place} {mismatch}, and repeat the command that began the sweep"
                )
            for facts in run.stages.values():
                for fact in RESOLVED.keys() & facts.keys():
                    name = RESOLVED[fact]
                    value = setting_value(run.config, name)
                    other, before = resolved.setdefault((name, value), (place, facts[fact]))
                    if before != facts[fact]:
                        raise ProbekitError(
                            f"{self.folder}: {name} {value!r} was {before} in {other} and {facts[fact]} in "
                            f"{place}, which cannot be compared; delete the folder of one, and continue "
                            "where the other was trained"
                        )
            runs[place] = run
        return runs

    @property
    def corpus(self) -> Corpus:
        """The corpus of all runs.

        Raises:
            ProbekitError: No run is finished.
        """
        if not self.runs:
            raise ProbekitError(f"{self.folder} has no finished run yet; repeat the command that began it")
        return next(iter(self.runs.values())).corpus

    @property
    def missing(self) -> list[Place]:
        """The runs that are not trained and evaluated yet."""
        return [place for place in self.places if place not in self.runs]

    def losses(self) -> pd.DataFrame:
        """Test losses of all finished runs, by member, seed, variant, source of actions and document.

        Raises:
            ProbekitError: No run is finished, or runs were not evaluated on the same tokens.
        """
        _ = self.corpus  # refuses a sweep without a finished run
        losses = self._of_all_runs(Run.losses)
        self._check_same(
            {place: tuple(rows.groupby("document").tokens.first()) for place, rows in self._by_place(losses)},
            "was not evaluated on the same tokens as others; delete its evaluation.json",
        )
        return losses

    def values(self) -> pd.DataFrame:
        """What metrics are computed from: `sum` and `count` by `KEYS`, `seed` and `document`.

        `document` is the number of a document's group, or that of a sample or of a line of questions: groups
        are what is resampled.

        Raises:
            ProbekitError: As for `losses`; or runs were asked other questions, or their generated texts were
                compared with other documents.
        """
        losses = self.losses().rename(columns={"loss": "sum", "tokens": "count"})
        losses = self.corpus.by_group(losses).assign(metric="perplexity", texts="test documents", length=0)
        self._check_same(
            {place: run.evaluation()["settings"].get("asked") for place, run in self.runs.items()},
            "was asked other questions than others (they depend on the window and the questions file); sweep "
            "over settings that leave them the same, or delete its evaluation.json",
        )
        generated = self._of_all_runs(_generated)
        if len(generated):
            true = generated[generated.variant == "true"]
            self._check_same(
                {
                    place: frozenset(zip(rows.texts, rows.document, strict=True))
                    for place, rows in self._by_place(true)
                },
                "generated text that was not compared with the same documents as that of others; delete its "
                "generation.json and generation.parquet",
            )
            generated = by_group(generated, self.corpus)
        columns = [*KEYS, "seed", "document", "sum", "count"]
        return pd.concat([losses, self._of_all_runs(_solved), generated], ignore_index=True)[columns]

    def table(self) -> pd.DataFrame:
        """What was measured: perplexity, accuracy of multiple choice, and the metrics of generated text.

        One row for each member, variant, source of actions, metric (of some texts of some length, if
        generated) and seed, and one over all seeds, with `seed` missing; see `statistics.over_seeds`. MAUVE
        compares all texts at once, so its mean over seeds has no interval. A column for each setting that
        members change.

        Raises:
            ProbekitError: As for `values`.
        """
        table = over_seeds(
            self.values(),
            KEYS,
            TRANSFORMS | {"perplexity": np.exp},
            resamples=self.config.evaluation.resamples,
            seed=self.config.seed,
        )
        if len(mauve := self._of_all_runs(_mauve)):
            table = pd.concat([table, _with_mean(mauve)], ignore_index=True)
        configs = {member: self.config_of(Place(member, 0)) for member in self.members}
        for column, name in enumerate(self.settings, start=1):
            values = {member: setting_value(config, name) for member, config in configs.items()}
            cells = {
                member: " ".join(map(str, value)) if isinstance(value, tuple) else value
                for member, value in values.items()
            }
            table.insert(column, name, table.member.map(cells))
        return table

    def _of_all_runs(self, read: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
        """A table of every run, concatenated in the order of the members."""
        order = {member: number for number, member in enumerate(self.members)}
        runs = sorted(self.runs.items(), key=lambda item: order[item[0].member])
        parts = (read(run).assign(member=place.member, seed=place.seed) for place, run in runs)
        return pd.concat(parts, ignore_index=True)

    @staticmethod
    def _by_place(table: pd.DataFrame) -> Iterator[tuple[Place, pd.DataFrame]]:
        key: Any
        for key, rows in table.groupby(["member", "seed"], sort=False):
            yield Place(*key), rows

    def _check_same(self, found: Mapping[Place, Hashable], what: str) -> None:
        """Refuses runs that differ in what makes them comparable, naming one that differs from most."""
        usual = Counter(found.values()).most_common(1)[0][0]
        for place, value in found.items():
            if value != usual:
                raise ProbekitError(
                    f"{self.folder}: {place} {what}, and repeat the command that began the sweep"
                )


def _mismatches(run: Run, config: Config) -> Iterator[str]:
    """What in a trained and evaluated run differs from what its sweep asks for, and how to repair it."""
    used = {name for stage in stages_of(config) for name in stage_settings(config, stage)}
    trained = run.config.with_absolute_paths()
    compared = [
        (
            "was trained with",
            {name: setting_value(trained, name) for name in {*used, "mixing.variants"}},
            {name: setting_value(config, name) for name in {*used, "mixing.variants"}},
            "delete its folder",
        ),
        (
            "was evaluated with",
            {f"evaluation.{name}": value for name, value in run.evaluation()["settings"].items()},
            {f"evaluation.{name}": value for name, value in evaluation_record(config).items()},
            "delete its evaluation.json",
        ),
    ]
    if (run.folder / "generation.json").is_file():
        wanted = config.generation.model_dump(mode="json", exclude={*ANY_NUMBER})
        wanted["seeds"] = [*(config.generation.seeds or (config.seed,))]
        found = run.generation_metrics()["settings"]
        compared.append(
            (
                "generated text with",
                {f"generation.{name}": value for name, value in found.items()},
                {f"generation.{name}": value for name, value in wanted.items()},
                "delete its generation.json",
            )
        )
    for verb, before, now, remedy in compared:
        for name in sorted(now):
            if name in before and before[name] != now[name]:
                yield f"{verb} {name} {before[name]!r}, and the sweep has {now[name]!r}; {remedy}"


def _generated(run: Run) -> pd.DataFrame:
    """Sums and counts of generated text, if it was measured, over all seeds of generation."""
    path = run.folder / "generation.parquet"
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame()


def _solved(run: Run) -> pd.DataFrame:
    """Sums and counts of multiple-choice questions, if they were asked."""
    if run.config.method != "depth-ensemble" or not (run.folder / "choices.parquet").is_file():
        return pd.DataFrame()
    choices = run.choices()
    if run.config.evaluation.questions_file is None:  # else documents are lines of the file
        choices = run.corpus.by_group(choices)
    questions = choices.groupby(["variant", "actions", "document"], sort=False).solved
    table = questions.agg(["sum", "count"]).reset_index()
    return table.assign(metric="accuracy", texts="questions", length=0)


def _mauve(run: Run) -> pd.DataFrame:
    if not (run.folder / "generation.json").is_file():
        return pd.DataFrame()
    metrics = pd.DataFrame(run.generation_metrics()["metrics"])
    return metrics[metrics.metric == "mauve"]


def _with_mean(each: pd.DataFrame) -> pd.DataFrame:
    """MAUVE of every seed with its interval, and the mean over seeds without."""
    each = each.assign(seed=each.seed.astype("Int64"), seed_spread=np.nan, seeds=1)
    means = each.groupby(KEYS, sort=False).agg(
        value=("value", "mean"),
        seed_spread=("value", "std"),
        seeds=("value", "size"),
        documents=("documents", "max"),
    )
    table = pd.concat([each, means.reset_index()], ignore_index=True)
    return table[[*KEYS, "seed", "value", "value_low", "value_high", "seed_spread", "seeds", "documents"]]


def sweep(
    config: Config,
    members: Members,
    seeds: Sequence[int],
    out: str | Path,
    *,
    generation: bool = False,
    quiet: bool = False,
) -> Sweep:
    """Trains and evaluates every member with every seed, each a run in `out/<member>/seed<N>`.

    Runs share all stages whose settings are equal: these are trained once, and linked. Called again, it
    continues an interrupted sweep, with new members and seeds added. A run that fails is reported after the
    others are finished.

    Args:
        config: The settings that members change.
        members: Settings by dotted name for every member by its name, which is also its folder's name.
        seeds: Seeds of every member's runs, in place of the setting `seed`.
        out: The sweep's folder.
        generation: Measure generated text, too.
        quiet: Show no progress.

    Raises:
        ProbekitError: A setting is bad, members have other corpora, the folder holds something else, or a
            run failed.
    """
    compute_device(config.device)  # refuses a device that is not there before anything is written
    config = config.with_absolute_paths()
    current = _begin(user_path(out).absolute(), config, members, seeds, generation=generation)
    progress, failed = Progress(quiet=quiet), dict[Place, ProbekitError]()
    with locked(current.folder):
        for number, place in enumerate(current.places, start=1):
            measured = not generation or (current.folder / str(place) / "generation.json").is_file()
            if place in current.runs and measured:
                continue
            progress.say(f"run {number} of {len(current.places)}: {place}")
            try:
                _run(current, place, progress, generation=generation, quiet=quiet)
            except ProbekitError as error:
                progress.say(f"{place} failed: {error}")
                failed[place] = error
        done = Sweep.open(current.folder)
        if done.runs:
            write_table(done.folder / "results.parquet", done.table())
    for place, reason in failed.items():
        count = f"{len(failed)} of {len(current.places)} runs in {done.folder} failed"
        raise ProbekitError(f"{place}: {reason} ({count}, the others are finished)")
    return done


def _run(current: Sweep, place: Place, progress: Progress, *, generation: bool, quiet: bool) -> None:
    """Trains and evaluates one run, except for what is finished or can be taken from another run."""
    folder, config = current.folder / str(place), current.config_of(place)
    if place in current.runs:
        run = current.runs[place]
    else:
        with Run.begin_locked(folder, config, "resume") as run:
            unfinished = [stage for stage in stages_of(config) if not run.finished(stage)]
            shared = _take_over(run, unfinished, current.folder)
        if shared:
            progress.say(f"shared with other runs: {', '.join(shared)}")
        if len(shared) < len(unfinished):
            run = train(config, folder, existing="resume", quiet=quiet)
    if not (folder / "evaluation.json").is_file():
        evaluate(run, quiet=quiet)
    if generation and not (folder / "generation.json").is_file():
        evaluate_generation(run, quiet=quiet)


def _take_over(run: Run, stages: Sequence[str], folder: Path) -> list[str]:
    """Takes stages that another run of the sweep has finished with equal settings; returns their names."""
    others = [Run.open(path.parent) for path in sorted(folder.glob("*/seed*/run.json"))]
    taken = []
    for stage in stages:
        wanted = stage_settings(run.config, stage)
        for other in others:
            if not (other.finished(stage) and stage_settings(other.config, stage) == wanted):
                continue
            if difference := other.difference(stage, run.config):
                raise ProbekitError(
                    f"{other.folder} has the stage {stage}, but {difference}; continue as it was trained"
                )
            if run.take_over(stage, other):
                taken.append(stage)
                break
    return taken


def _begin(
    folder: Path, config: Config, members: Members, seeds: Sequence[int], *, generation: bool
) -> Sweep:
    """Checks everything that can be checked before anything is written; continues an existing sweep."""
    wanted = Sweep.of(folder, config, members, seeds)
    _check(wanted, generation=generation)
    if (folder / SWEEP).is_file():
        found = Sweep.open(folder)
        was: dict[str, Any] = {name: setting_value(found.config, name) for name in setting_names()}
        now: dict[str, Any] = {name: setting_value(config, name) for name in setting_names()}
        shared = found.members.keys() & wanted.members.keys()
        for name in (*setting_names(), *sorted(shared)):
            before, after = ({**was, **found.members}[name], {**now, **wanted.members}[name])
            if before != after and name not in ("seed", "device"):
                raise ProbekitError(
                    f"{folder} was begun with other settings: {name} was {before!r} and is now {after!r}; "
                    "choose another --out"
                )
        wanted = Sweep.of(
            folder, config, found.members | wanted.members, dict.fromkeys([*found.seeds, *seeds])
        )
        _check_one_corpus(wanted)
        _ = wanted.runs  # refuses a run that is not what the sweep asks for before anything is trained
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ProbekitError(f"{folder} exists and holds no sweep; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        wanted.write()
    return wanted


def _check(wanted: Sweep, *, generation: bool) -> None:
    if not wanted.members:
        raise ProbekitError("the sweep has no members; give one or more")
    if not wanted.seeds:
        raise ProbekitError("the sweep has no seeds; --seeds takes how many, 1 or more, or several seeds")
    if twice := [seed for seed in wanted.seeds if wanted.seeds.count(seed) > 1]:
        raise ProbekitError(f"the seed {twice[0]} is given twice; leave one out")
    for place in wanted.places:
        _check_member(place.member, wanted.config_of(place), wanted.members[place.member], generation)
    _check_one_corpus(wanted)


def _check_member(member: str, config: Config, settings: Mapping[str, Any], generation: bool) -> None:
    if not re.fullmatch(r"\w[\w.=,+-]*", member):
        raise ProbekitError(
            f"{member!r} is no name of a member, which becomes a folder's: it begins with a letter or digit, "
            "followed by letters, digits and _ . = , + -"
        )
    if config.lm.name is None:
        check_new_model(config)
    if "seed" in settings:
        raise ProbekitError("seed is no setting to sweep over; give --seeds")
    measured = ("evaluation.", "generation.") if generation else ("evaluation.",)
    for name in settings:
        if not name.startswith(measured) and (reason := why_idle(config, name)):
            raise ProbekitError(f"{name} changes nothing that the sweep trains or measures: {reason}")


def _check_one_corpus(wanted: Sweep) -> None:
    """Refuses members with other corpora: their perplexities could not be compared."""
    corpora = {
        member: stage_settings(wanted.config_of(Place(member, wanted.seeds[0])), "corpus")
        for member in wanted.members
    }
    (first, settings), *others = corpora.items()
    for other, its_settings in others:
        for name, value in settings.items():
            if its_settings[name] != value:
                raise ProbekitError(
                    f"{name} is {value!r} in {first} and {its_settings[name]!r} in {other}: that makes other "
                    "corpora, whose perplexities cannot be compared; make a run of each by `probekit train`"
                )
