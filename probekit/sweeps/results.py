"""A sweep's folder, read back: its runs, what was measured, what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.config import Config, setting_names, setting_value, unknown_setting
from probekit.errors import ProbekitError
from probekit.evaluation.generation_metrics import TRANSFORMS
from probekit.evaluation.over_seeds import over_seeds
from probekit.run import Run
from probekit.run_folder import SWEEP
from probekit.storage import read_json, write_json
from probekit.sweeps.alike import come_to_in, strays
from probekit.sweeps.members import Members

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
