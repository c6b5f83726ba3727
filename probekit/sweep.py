"""`probekit sweep`: the same settings with some changed, over seeds; a run for each, no stage trained twice.

OUT/sweep.json        settings, members, seeds
OUT/<member>/seed<N>  a run like any other
OUT/results.parquet   one row for each member, variant, metric and seed, and one over all seeds
"""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pandas as pd

from probekit.config import Config, setting_names, setting_value, unknown_setting
from probekit.distributed import compute_device
from probekit.errors import ProbekitError
from probekit.evaluation.evaluate import evaluate
from probekit.evaluation.perplexity import evaluation_record
from probekit.generation.evaluate import TRANSFORMS
from probekit.io import held, read_json, write_json, write_table
from probekit.progress import Progress
from probekit.run.folder import RECORDED, SWEEP
from probekit.run.run import Run
from probekit.run.stages import stage_settings, stages_of, why_idle
from probekit.statistics import over_seeds
from probekit.training.train import check_new_model, train

Members = Mapping[str, Mapping[str, Any]]
"""Settings by dotted name, for every member by its name."""


@dataclass(frozen=True)
class Study:
    """A sweep with a name.

    Attributes:
        setting: What it sweeps over.
        values: Its values where none are given.
        variant: The variant that it is about; others are trained beside it only where they are asked for.
    """

    setting: str
    values: tuple[Any, ...]
    variant: str


STUDIES = {"mixing-fraction": Study("mixing.fraction", (0, 0.25, 0.5, 0.75, 1), "mixed")}
"""Sweeps that the papers make (arXiv 2410.12492, Figure 4)."""


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
        member = ",".join(f"{name}={_text(value)}" for name, value in settings.items())
        if member in members:
            raise ProbekitError(f"{member} is given twice; leave one out")
        members[member] = settings
    return members


def _text(value: Any) -> str:
    """A setting's value in the name of a folder."""
    if isinstance(value, tuple):
        return "+".join(map(_text, value))
    if isinstance(value, bool | None):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else re.sub(r"[^\w.-]", "_", str(value))


UNTOLD = ("prompts", "batch_size")
"""Settings of generation that need not be what is recorded: how many were there; what changes nothing."""


def strays(run: Run, config: Config) -> Iterator[str]:
    """What in a trained and evaluated run is not as its settings in a sweep would have it."""
    used = {
        "mixing.variants",
        *(name for stage in stages_of(config) for name in stage_settings(config, stage)),
    }
    yield from _differences(
        {name: setting_value(run.config, name) for name in used},
        {name: setting_value(config, name) for name in used},
        "was trained with",
        "delete its folder",
    )
    yield from _differences(
        {f"evaluation.{name}": value for name, value in run.evaluation()["settings"].items()},
        {f"evaluation.{name}": value for name, value in evaluation_record(config).items()},
        "was evaluated with",
        "delete its evaluation.json",
    )
    if not (run.folder / "generation.json").is_file():
        return
    wanted = config.generation.model_dump(mode="json", exclude={*UNTOLD})
    wanted |= {"seeds": [*(config.generation.seeds or (config.seed,))]}
    yield from _differences(
        {f"generation.{name}": value for name, value in run.generation_metrics()["settings"].items()},
        {f"generation.{name}": value for name, value in wanted.items()},
        "generated text with",
        "delete its generation.json",
    )


def come_to_in(run: Run) -> dict[tuple[str, Any], str]:
    """What settings came to in a run that do not tell all, by their name and value."""
    stages = read_json(run.folder / "run.json")["stages"].values()
    return {
        (name, setting_value(run.config, name)): facts[fact]
        for name, fact in RECORDED.items()
        for facts in stages
        if fact in facts
    }


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], verb: str, remedy: str
) -> Iterator[str]:
    for name in sorted(wanted):
        if name in found and found[name] != wanted[name]:
            yield f"{verb} {name} {found[name]!r}, and the sweep has {wanted[name]!r}; {remedy}"


FORMAT = 1
"""Version of the record; others are refused."""

KEYS = ["member", "variant", "actions", "texts", "length", "metric"]
"""What tells a metric in the table from the others; `length` in tokens, 0 where texts have their own."""


@dataclass(frozen=True)
class Place:
    """One run of a sweep."""

    member: str
    seed: int

    def __str__(self) -> str:
        return f"{self.member}/seed{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder; of one that was stopped, what is there can be read.

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
        """A sweep whose settings' values have the types of the settings.

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

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a folder holds a sweep."""
        return (folder / SWEEP).is_file()

    @classmethod
    def open(cls, folder: str | Path) -> Sweep:
        """Opens a sweep's folder.

        Raises:
            ProbekitError: It holds no sweep, one of another version, or a damaged one.
        """
        folder = Path(folder)
        if not cls.is_in(folder):
            what = "does not exist" if not folder.exists() else f"holds no sweep (no {SWEEP})"
            raise ProbekitError(f"{folder} {what}; make one with `probekit sweep ... --out {folder}`")
        record = read_json(folder / SWEEP)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ProbekitError(f"{folder / SWEEP} is no record of a sweep in format {FORMAT}; sweep again")
        return cls.of(folder, Config.from_dict(record["config"]), record["members"], record["seeds"])

    def write(self) -> None:
        """Writes the record."""
        record = {"format": FORMAT, "config": self.config.model_dump(mode="json")}
        write_json(self.folder / SWEEP, record | {"members": self.members, "seeds": self.seeds})

    @property
    def places(self) -> list[Place]:
        """Its runs, seed by seed: one that was stopped has all members of the first seeds."""
        return [Place(member, seed) for seed in self.seeds for member in self.members]

    @cached_property
    def runs(self) -> dict[Place, Run]:
        """The runs that are trained and evaluated.

        Raises:
            ProbekitError: One has other settings than the sweep gives it, or was made in another way than
                another run.
        """
        folders = {place: self.folder / str(place) for place in self.places}
        runs = {
            place: Run.open(folder)
            for place, folder in folders.items()
            if (folder / "evaluation.json").is_file()
        }
        seen: dict[tuple[str, Any], tuple[Place, str]] = {}
        for place, run in runs.items():
            for stray in strays(run, self.config_of(place)):
                raise ProbekitError(
                    f"{self.folder}: {place} {stray}, and go on with the command that began the sweep"
                )
            for setting, value in come_to_in(run).items():
                other, its_value = seen.setdefault(setting, (place, value))
                if its_value != value:
                    name = f"{setting[0]} {setting[1]!r}"
                    raise ProbekitError(
                        f"{self.folder}: {name} came to {its_value} in {other} and to {value} in {place}: "
                        "they cannot be compared; delete the folder of one, and go on where the other was "
                        "trained"
                    )
        return runs

    @property
    def missing(self) -> list[Place]:
        """The runs that are not trained and evaluated yet."""
        return [place for place in self.places if place not in self.runs]

    def config_of(self, place: Place) -> Config:
        """The settings of one run."""
        return self.config.override({**self.members[place.member], "seed": place.seed})

    def losses(self) -> pd.DataFrame:
        """Test losses of all runs that are there, by member, seed, variant, source of actions and document.

        Raises:
            ProbekitError: None is there, or they were not evaluated on the same documents.
        """
        if not self.runs:
            raise ProbekitError(
                f"{self.folder} has no finished run yet; go on with the command that began it"
            )
        losses = self._of_all_runs(Run.losses)
        tokens = losses.pivot_table("tokens", index=["member", "seed"], columns="document", aggfunc="first")
        if len(tokens.drop_duplicates()) > 1:
            wrong = tokens[tokens.ne(tokens.mode().iloc[0]).any(axis=1)].index[0]
            raise ProbekitError(
                f"{self.folder}: {Place(*wrong)} was not evaluated on the same tokens as others; delete its "
                "evaluation.json, and go on with the command that began the sweep"
            )
        return losses

    def table(self) -> pd.DataFrame:
        """What was measured: perplexity, and whatever was measured of generated text.

        One row for each member, variant, source of actions, metric (of some texts of some length, if
        generated) and seed, and one over all seeds, where `seed` is missing, as `over_seeds` has it. MAUVE
        is of all texts at once: its mean over seeds has no interval. A column for each setting that members
        change.

        Raises:
            ProbekitError: As for `losses`.
        """
        table = over_seeds(
            self.values(),
            KEYS,
            TRANSFORMS | {"perplexity": np.exp},
            resamples=self.config.evaluation.resamples,
            seed=self.config.seed,
        )
        if len(mauve := self._of_all_runs(_mauve)):
            table = pd.concat([table, _mean_of_whole(mauve)], ignore_index=True)
        configs = {member: self.config_of(Place(member, 0)) for member in self.members}
        for column, name in enumerate(self.settings, start=1):
            values = {member: _plain(setting_value(config, name)) for member, config in configs.items()}
            table.insert(column, name, table.member.map(values))
        return table

    def values(self) -> pd.DataFrame:
        """What metrics are made of: `sum` and `count` by `KEYS`, `seed` and `document` (or generated sample).

        Raises:
            ProbekitError: As for `losses`; or generated texts were not measured against the same documents.
        """
        losses = self.losses().rename(columns={"loss": "sum", "tokens": "count"})
        losses = losses.assign(metric="perplexity", texts="test documents", length=0)
        columns = [*KEYS, "seed", "document", "sum", "count"]
        self._check_questions()
        generated = self._of_all_runs(_generated)
        if len(generated):
            self._check_documents(generated[generated.variant == "true"])
        return pd.concat([losses, self._of_all_runs(_solved), generated], ignore_index=True)[columns]

    def _check_questions(self) -> None:
        """Refuses multiple choice of other questions in one run than in others."""
        asked = {place: run.evaluation()["settings"].get("asked") for place, run in self.runs.items()}
        (usual, _), *others = Counter(asked.values()).most_common()
        if others:
            wrong = next(place for place, digest in asked.items() if digest != usual)
            raise ProbekitError(
                f"{self.folder}: {wrong} was asked other questions than others (they depend on the window "
                "and on the file of questions): accuracies cannot be compared; sweep over what leaves them "
                "the same, or delete its evaluation.json, and go on with the command that began the sweep"
            )

    def _check_documents(self, true: pd.DataFrame) -> None:
        """Refuses values of true texts that are of other documents in one run than in others."""
        found = {
            place: frozenset(zip(rows.texts, rows.document, strict=True))
            for place in self.runs
            if len(rows := true[(true.member == place.member) & (true.seed == place.seed)])
        }
        (usual, runs), *_ = Counter(found.values()).most_common(1)
        if runs < len(found):
            wrong = next(place for place, documents in found.items() if documents != usual)
            raise ProbekitError(
                f"{self.folder}: generated text of {wrong} was not measured against the same documents as "
                "that of others; delete its generation.json and generation.parquet, and go on with the "
                "command that began the sweep"
            )

    def _of_all_runs(self, read: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
        """A table of every run, one behind the other, in the order of the members."""
        order = {member: number for number, member in enumerate(self.members)}
        runs = sorted(self.runs.items(), key=lambda item: order[item[0].member])
        parts = (read(run).assign(member=place.member, seed=place.seed) for place, run in runs)
        return pd.concat(parts, ignore_index=True)

    @property
    def settings(self) -> list[str]:
        """The settings that members change."""
        return list(dict.fromkeys(name for settings in self.members.values() for name in settings))


def _generated(run: Run) -> pd.DataFrame:
    """Sums and counts of generated text, where it was measured; over all seeds of generation."""
    path = run.folder / "generation.parquet"
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame()


def _solved(run: Run) -> pd.DataFrame:
    """Sums and counts of multiple-choice questions, where these were asked."""
    path = run.folder / "choices.parquet"
    if run.config.method != "depth-ensemble" or not path.is_file():
        return pd.DataFrame()
    questions = pd.read_parquet(path).groupby(["variant", "actions", "document"], sort=False).solved
    table = questions.agg(["sum", "count"]).reset_index()
    return table.assign(metric="accuracy", texts="questions", length=0)


def _mauve(run: Run) -> pd.DataFrame:
    if not (run.folder / "generation.json").is_file():
        return pd.DataFrame()
    metrics = pd.DataFrame(run.generation_metrics()["metrics"])
    return metrics[metrics.metric == "mauve"]


def _mean_of_whole(each: pd.DataFrame) -> pd.DataFrame:
    """Values that are of all texts at once: each seed's with its interval, and their mean without."""
    each = each.assign(seed=each.seed.astype("Int64"), seed_spread=np.nan, seeds=1)
    values = each.groupby(KEYS, sort=False).agg(
        value=("value", "mean"),
        seed_spread=("value", "std"),
        seeds=("value", "size"),
        documents=("documents", "max"),
    )
    table = pd.concat([each, values.reset_index()], ignore_index=True)
    return table[[*KEYS, "seed", "value", "value_low", "value_high", "seed_spread", "seeds", "documents"]]


def _plain(value: Any) -> Any:
    """A setting's value as a cell of a table."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


MEASURING = "measuring"
"""What a run does beside its stages."""


class TimeLeft:
    """Stages that are still to be trained, and how long those that were took.

    Args:
        finished: Settings of runs that are finished: what they have is shared.
        ahead: Settings of the others, in their order.
    """

    def __init__(self, finished: Iterable[Config], ahead: Sequence[Config]) -> None:
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        made = {key for config in finished for key in _keys(config).values()}
        self._ahead: list[list[str]] = []
        for config in ahead:
            keys = _keys(config)
            self._ahead.append([MEASURING, *(stage for stage, key in keys.items() if key not in made)])
            made.update(keys.values())

    def done(self, run: Run | None, trained: Sequence[str], seconds: float) -> None:
        """Takes the next run off; None for one that failed.

        Args:
            run: The run.
            trained: Its stages that were trained, not shared.
            seconds: How long all of it took.
        """
        self._ahead.pop(0)
        if run is None:
            return
        stages = read_json(run.folder / "run.json")["stages"]
        took = {stage: stages[stage]["seconds"] for stage in trained}
        for stage, its_seconds in (took | {MEASURING: max(0.0, seconds - sum(took.values()))}).items():
            self._seconds[stage].append(its_seconds)

    @property
    def seconds(self) -> float | None:
        """For the runs ahead; None while a stage of theirs was not trained yet."""
        ahead = [stage for stages in self._ahead for stage in stages]
        if not {*ahead} <= self._seconds.keys():
            return None
        return sum(mean(self._seconds[stage]) for stage in ahead)


def _keys(config: Config) -> dict[str, str]:
    return {stage: f"{stage} {stage_settings(config, stage)}" for stage in stages_of(config)}


MEMBER = re.compile(r"\w[\w.=,+-]*")
"""Names of members: folders everywhere."""


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

    Runs share all stages that their settings leave equal: these are trained once, and linked. Called again,
    it goes on where it was stopped; members and seeds that are new are added. A run that fails is told when
    the others are done.

    Args:
        config: The settings that members change.
        members: Settings by dotted name for every member by its name, the name of its folder too.
        seeds: Seeds of every member's runs, in place of the setting `seed`.
        out: The sweep's folder.
        generation: Measure generated text, too.
        quiet: Show no progress.

    Raises:
        ProbekitError: A setting is bad, members have other corpora, the folder holds something else, or a
            run failed.
    """
    compute_device(config.device)  # one that is not there is told once, and before anything is written
    begun = _begin(Path(out), config, members, seeds, generation=generation)
    with held(begun.folder):
        failed = _all_runs(begun, Progress(quiet=quiet), generation=generation, quiet=quiet)
        done, places = Sweep.open(begun.folder), begun.places
        if done.runs:
            write_table(done.folder / "results.parquet", done.table())
    for place, reason in failed.items():
        raise ProbekitError(
            f"{place}: {reason} ({len(failed)} of {len(places)} runs in {done.folder} failed, the others are "
            "finished)"
        )
    return done


def _all_runs(
    begun: Sweep, progress: Progress, *, generation: bool, quiet: bool
) -> dict[Place, ProbekitError]:
    """Trains and evaluates all runs; those that failed, with the reason."""
    failed: dict[Place, ProbekitError] = {}
    places = begun.places
    finished = [place for place in places if _is_done(begun, place, generation=generation)]
    ahead = [begun.config_of(place) for place in places if place not in finished]
    time_left = TimeLeft((begun.config_of(place) for place in begun.runs), ahead)
    for number, place in enumerate(places):
        if place in finished:
            continue
        left = "" if time_left.seconds is None else f"; about {time_left.seconds:.0f} s left"
        progress.say(f"run {number + 1} of {len(places)}: {place}{left}")
        since = time.monotonic()
        run, trained = None, list[str]()
        try:
            run, trained = _run(begun, place, progress, generation=generation, quiet=quiet)
        except ProbekitError as error:
            progress.say(f"{place} failed: {error}")
            failed[place] = error
        time_left.done(run, trained, time.monotonic() - since)
    return failed


def _is_done(begun: Sweep, place: Place, *, generation: bool) -> bool:
    measured = not generation or (begun.folder / str(place) / "generation.json").is_file()
    return place in begun.runs and measured


def _run(
    begun: Sweep, place: Place, progress: Progress, *, generation: bool, quiet: bool
) -> tuple[Run, list[str]]:
    """Trains and evaluates one run, but for what is done already or another run of the sweep has.

    Returns:
        The run, and the stages that were trained.
    """
    folder, config = begun.folder / str(place), begun.config_of(place)
    trained: list[str] = []
    if place in begun.runs:
        run = begun.runs[place]
    else:
        with Run.begun(folder, config, "resume") as run:
            unfinished = [stage for stage in stages_of(config) if not run.finished(stage)]
            shared = _take_over(run, unfinished, begun.folder)
        if shared:
            progress.say(f"shared with other runs: {', '.join(shared)}")
        trained = [stage for stage in unfinished if stage not in shared]
        if trained:
            run = train(config, folder, existing="resume", quiet=quiet)
    if not (folder / "evaluation.json").is_file():
        evaluate(run, quiet=quiet)
    if generation and not (folder / "generation.json").is_file():
        from probekit.generation.evaluate import evaluate_generation

        evaluate_generation(run, quiet=quiet)
    return run, trained


def _take_over(run: Run, stages: Sequence[str], folder: Path) -> list[str]:
    """Takes those of a run's stages that another run of the sweep has finished with equal settings."""
    others = [Run.open(path.parent) for path in sorted(folder.glob("*/seed*/run.json"))]
    taken = []
    for stage in stages:
        wanted = stage_settings(run.config, stage)
        for other in others:
            if not (other.finished(stage) and stage_settings(other.config, stage) == wanted):
                continue
            if difference := other.difference(stage, run.config):
                raise ProbekitError(
                    f"{other.folder} has the stage {stage}, but {difference}; go on as it was trained"
                )
            if run.take_over(stage, other):
                taken.append(stage)
                break
    return taken


def _begin(
    folder: Path, config: Config, members: Members, seeds: Sequence[int], *, generation: bool
) -> Sweep:
    """Checks all that can be before anything is written; goes on with a sweep that is there."""
    wanted = Sweep.of(folder, config, members, seeds)
    _check(wanted, generation=generation)
    if Sweep.is_in(folder):
        found = Sweep.open(folder)
        _check_same(found, wanted)
        wanted = Sweep.of(
            folder, config, found.members | wanted.members, dict.fromkeys([*found.seeds, *seeds])
        )
        _check_one_corpus(wanted)
        _ = wanted.runs  # told before anything is trained: a run that is not what the sweep asks for
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ProbekitError(f"{folder} exists and holds no sweep; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        wanted.write()
    return wanted


def _check(wanted: Sweep, *, generation: bool) -> None:
    if not wanted.members:
        raise ProbekitError("the sweep has no members; give one or more")
    if not wanted.seeds:
        raise ProbekitError("the sweep has no seeds; --seeds takes how many, 1 or more, or several seeds")
    for seed in wanted.seeds:
        if wanted.seeds.count(seed) > 1:
            raise ProbekitError(f"the seed {seed} is given twice; leave one out")
        wanted.config.override({"seed": seed})
    for member, settings in wanted.members.items():
        if not MEMBER.fullmatch(member):
            raise ProbekitError(
                f"{member!r} is no name of a member: it becomes a folder's, so it begins with a letter or "
                "digit, and has letters, digits and _ . = , + - behind it"
            )
        config = wanted.config_of(Place(member, wanted.seeds[0]))
        if config.lm.name is None:
            check_new_model(config)
        for name in settings:
            _check_changes_something(config, name, generation=generation)
    _check_one_corpus(wanted)


def _check_one_corpus(wanted: Sweep) -> None:
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


def _check_changes_something(config: Config, name: str, *, generation: bool) -> None:
    """Refuses a setting that leaves all runs equal."""
    if name == "seed":
        raise ProbekitError("seed is no setting to sweep over; give --seeds")
    measured = ("evaluation", "generation") if generation else ("evaluation",)
    if name.split(".")[0] in measured:
        return
    if reason := why_idle(config, name):
        raise ProbekitError(f"{name} changes nothing that the sweep trains or measures: {reason}")


def _check_same(found: Sweep, wanted: Sweep) -> None:
    begun = f"{found.folder} was begun with other settings: "
    for name in setting_names():
        was, now = setting_value(found.config, name), setting_value(wanted.config, name)
        if was != now and name not in ("seed", "device"):
            raise ProbekitError(f"{begun}{name} was {was!r} and is now {now!r}; choose another --out")
    for member in found.members.keys() & wanted.members.keys():
        was, now = found.members[member], wanted.members[member]
        if was != now:
            raise ProbekitError(f"{begun}{member} was {was!r} and is now {now!r}; choose another --out")
