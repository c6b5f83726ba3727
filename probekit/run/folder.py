"""A run's folder: what is in it, how it is begun, read back and marked as it grows.

config.yaml       complete settings          planner/      planner weights
provenance.json   versions, commit, seeds    adapters/     one file for each variant, joint ones with planner
run.json          finished stages, checksums metrics.jsonl losses of every stage
corpus/           tokens, labels, codebook   evaluation.json, probes/, figures/
lm/               the base LM, in Hugging Face format, or the name and revision of a pre-trained one
adapters/V/       the LM of variant V, if it was tuned: low-rank updates, or all weights
interventions/V/  what interventions in variant V found
subnetworks/V/    which components of variant V the next action's information needs
depth/            one file for each member of a depth ensemble; depth/M/ its LM, if it was tuned
checkpoints/S/    of stage S: what goes on from where it was stopped, and runs as they were behind a step
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.io import (
    TEMPORARY,
    Record,
    atomic_folder,
    clear_temporaries,
    first_damaged,
    held,
    link_or_copy,
    read_json,
    read_table,
    record_of,
    text_checksum,
    value_checksum,
    write_json,
    write_text,
)
from probekit.run.provenance import come_to, provenance
from probekit.run.stages import stage_settings, stages_before, stages_of

if TYPE_CHECKING:
    import pandas as pd

    pass


END_OF_SETTINGS = b"\n...\n"
"""How config.yaml ends when it is whole."""

CHECKED_SETTINGS = "# sha256 of all below: "
"""How config.yaml begins; the checksum follows."""


def check_settings(folder: Path) -> None:
    """Refuses settings of a run that are not whole; where there are none, nothing is said.

    Raises:
        ProbekitError: They were cut off, or changed since they were written.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return
    written = path.read_bytes()
    if not written.endswith(END_OF_SETTINGS):
        raise ProbekitError(f"{path} is cut off: its last line must be '...'; copy or train the run again")
    first, _, settings = written.decode("utf-8", "replace").partition("\n")
    if first.startswith(CHECKED_SETTINGS) and first != CHECKED_SETTINGS + text_checksum(settings):
        raise ProbekitError(
            f"{path} was changed or damaged since the run wrote it; copy it again, or, if the change is "
            "meant, delete its first line"
        )


def write_settings(folder: Path, config: Config) -> None:
    """Writes a run's settings."""
    from probekit.io import write_text

    settings = config.to_yaml()
    write_text(folder / "config.yaml", f"{CHECKED_SETTINGS}{text_checksum(settings)}\n{settings}")


class RunResults:
    """The results in a run's folder.

    Attributes:
        folder: Where it is.
    """

    folder: Path

    def metrics(self) -> pd.DataFrame:
        """The rows of metrics.jsonl."""
        import pandas as pd

        path = self.folder / "metrics.jsonl"
        if not path.exists():
            raise ProbekitError(f"{self.folder} has no metrics yet; train it first")
        for stage, facts in read_json(self.folder / "run.json")["stages"].items():
            if facts.get("rows", found := self.rows_checksum(stage)) != found:
                raise ProbekitError(f"{path} is damaged (rows of {stage} are other ones); copy it again")
        return pd.DataFrame(read_rows(path))

    def rows_checksum(self, stage: str) -> str | None:
        """A checksum of a stage's rows of metrics.jsonl; None where it has none."""
        path = self.folder / "metrics.jsonl"
        rows = [row for row in read_rows(path) if row["stage"] == stage] if path.exists() else []
        return value_checksum(rows) if rows else None

    def losses_of(self, stage: str) -> pd.DataFrame:
        """A stage's losses in training: columns `step`, `loss` and `validation_loss`."""
        metrics = self.metrics()
        return metrics[metrics.stage == stage][["step", "loss", "validation_loss"]]

    def evaluation(self) -> dict[str, Any]:
        """What `probekit evaluate` found."""
        if not (self.folder / "evaluation.json").exists():
            raise ProbekitError(f"{self.folder} is not evaluated; run `probekit evaluate {self.folder}`")
        return read_json(self.folder / "evaluation.json")

    def losses(self) -> pd.DataFrame:
        """Test losses by document, variant and source of actions, as `probekit evaluate` left them."""
        return self._table("losses.parquet", "evaluate")

    def generation_metrics(self) -> dict[str, Any]:
        """What `probekit evaluate --generation` found."""
        if not (self.folder / "generation.json").exists():
            raise ProbekitError(
                f"{self.folder} has no generation.json; run `probekit evaluate {self.folder} --generation`"
            )
        return read_json(self.folder / "generation.json")

    def choices(self) -> pd.DataFrame:
        """Who solves which multiple-choice question, as `probekit evaluate` left it (depth ensemble)."""
        return self._table("choices.parquet", "evaluate")

    def probes(self) -> pd.DataFrame:
        """What `probekit probe` found: one row for each reader and cell of the grid."""
        return self._table("probes/results.parquet", "probe")

    def checkpoints_of(self, stage: str) -> Path:
        """The folder of a stage's checkpoints."""
        return self.folder / "checkpoints" / stage

    def probes_file(self, stage: str) -> Path:
        """Where the results of probing a stage's checkpoints are."""
        return self.checkpoints_of(stage) / "probes.parquet"

    def probes_over_training(self, stage: str = "lm") -> pd.DataFrame:
        """What `probekit probe --checkpoints` found: the rows of `probes` with the stage's `step`."""
        return self._table(str(self.probes_file(stage).relative_to(self.folder)), "probe --checkpoints")

    def interventions(self) -> pd.DataFrame:
        """What `probekit intervene` found, of all variants: a row for each condition, place and metric."""
        return self._of_variants("interventions", "results.parquet", "intervene")

    def subnetworks(self) -> pd.DataFrame:
        """What `probekit subnetwork` found, of all variants: a row for each condition, draw and metric."""
        return self._of_variants("subnetworks", "results.parquet", "subnetwork")

    def subnetwork_masks(self) -> pd.DataFrame:
        """The subnetworks themselves, of all variants: a row for each component."""
        return self._of_variants("subnetworks", "mask.parquet", "subnetwork")

    def _of_variants(self, folder: str, name: str, command: str) -> pd.DataFrame:
        import pandas as pd

        variants = sorted(path.parent.name for path in self.folder.glob(f"{folder}/*/{name}"))
        tables = [self._table(f"{folder}/{variant}/{name}", command) for variant in variants or ["none"]]
        return pd.concat(tables, ignore_index=True)

    def _table(self, name: str, command: str) -> pd.DataFrame:
        path, remedy = self.folder / name, f"run `probekit {command} {self.folder}`"
        if not path.exists():
            raise ProbekitError(f"{path} does not exist; {remedy}")
        try:
            return read_table(path)
        except ValueError as error:
            raise ProbekitError(f"{path} is damaged ({error}); {remedy}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last one that an interruption cut off is left out."""
    try:
        *whole, _ = path.read_text("utf-8").split("\n")
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ProbekitError(f"{path} is damaged ({error}); delete it") from None


FORMAT = 1
"""Version of the folder's layout; other versions are refused, not guessed at."""

BEGUN = ("provenance.json", "config.yaml", "run.json")
"""Files of every run from its beginning, as they are written; a folder without them is never overwritten."""

RECORDED = {"training.precision": "precision", "lm.name": "weights"}
"""Facts of stages that tell what a setting came to, whose value alone does not."""

SWEEP = "sweep.json"
"""What a sweep's folder has in place of a run's `run.json`."""

SHOWN = {"": "stages", "adapter": "variants", "depth": "members"}
"""How a run's finished stages are shown, by what stands before their names."""

Existing = Literal["refuse", "resume", "overwrite"]


class RunFolder(RunResults):
    """A run's folder, open for reading and for stages to be added.

    Attributes:
        folder: Where it is.
        config: Its complete settings.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = config

    def __repr__(self) -> str:
        """The folder, and what is finished: whole stages, and parts of those that have some."""
        called = f"{type(self).__name__}({str(self.folder)!r}"
        try:
            finished = [name.rpartition("/") for name in read_json(self.folder / "run.json")["stages"]]
        except ProbekitError:
            return f"{called}, gone)"
        parts = [
            f"{told}: {', '.join(names)}"
            for stage, told in SHOWN.items()
            if (names := [name for of, _, name in finished if of == stage])
        ]
        return ", ".join([called, *(parts or ["nothing finished"])]) + ")"

    @classmethod
    @contextmanager
    def begun(
        cls, folder: str | Path, config: Config | None, existing: Existing = "refuse"
    ) -> Iterator[Self]:
        """As `begin`; meanwhile no other process can begin the run or go on with it."""
        with ExitStack() as stack:
            there = Path(folder).is_dir()
            if there:
                stack.enter_context(held(folder))
            run = cls.begin(folder, config, existing)
            if not there:
                stack.enter_context(held(run.folder))
            yield run

    @classmethod
    def begin(cls, folder: str | Path, config: Config | None, existing: Existing = "refuse") -> Self:
        """Begins a run, or goes on with one.

        Args:
            folder: The run's folder.
            config: Its settings; None takes those of the run that is resumed.
            existing: What to do where the folder exists already.

        Raises:
            ProbekitError: The folder exists and `existing` refuses it, it is no run, or it was begun with
                other settings.
        """
        folder = Path(folder)
        if existing == "resume" and (folder / "run.json").exists():
            return cls._resume(folder, config)
        is_run = all((folder / name).is_file() for name in BEGUN)
        # Where nothing was done yet, as when the LM could not be had, there is nothing to keep.
        holds = is_run and {path.name for path in folder.iterdir()} != {*BEGUN}
        if holds and existing != "overwrite":
            raise ProbekitError(
                f"{folder} holds a run already; go on with it by --resume, replace it by --overwrite, or "
                "choose another --out"
            )
        if config is None:
            raise ProbekitError(f"{folder} holds no run to resume; give --preset or --config to begin one")
        if not is_run and folder.exists() and not (folder.is_dir() and _was_hardly_begun(folder)):
            raise ProbekitError(f"{folder} exists and holds no run; choose another --out")
        origin = provenance(config)  # refuses a device that is not there, before anything is touched
        if is_run:
            _empty(folder)
        try:
            folder.resolve().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProbekitError(
                f"--out {folder}: cannot be made ({error.strerror}); choose another"
            ) from None
        for name in BEGUN:
            clear_temporaries(folder, name)
        write_json(folder / "provenance.json", origin)
        write_settings(folder, config)
        write_json(folder / "run.json", {"format": FORMAT, "stages": {}})
        return cls(folder, config)

    @classmethod
    def _resume(cls, folder: Path, config: Config | None) -> Self:
        run = cls.open(folder)
        run.check_writable()
        _check_same(run, config or run.config)
        if config is None or config == run.config:
            return run
        if not read_json(folder / "run.json")["stages"]:  # as good as begun anew, with other seeds perhaps
            write_json(folder / "provenance.json", provenance(config))
        write_settings(folder, config)
        return cls(folder, config)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Opens a run's folder.

        Raises:
            ProbekitError: It is not a run, one of another version, or a damaged one.
        """
        folder = Path(folder)
        if (folder / SWEEP).is_file():
            runs = sorted(str(path.parent) for path in folder.glob("*/seed*/run.json"))
            shown = ", ".join([*runs[:3], *(["…"] if len(runs) > 3 else [])])
            raise ProbekitError(f"{folder} is a sweep; its runs are {shown or 'not begun yet'}")
        if not (folder / "run.json").is_file():
            what = "does not exist" if not folder.exists() else "holds no run (no run.json)"
            raise ProbekitError(f"{folder} {what}; make one with `probekit train --out {folder}`")
        state = read_json(folder / "run.json")
        if not (isinstance(state, dict) and "format" in state and isinstance(state.get("stages"), dict)):
            raise ProbekitError(f"{folder / 'run.json'} is no record of a run; train it again")
        if (found := state["format"]) != FORMAT:
            raise ProbekitError(
                f"{folder} has run format {found}, this probekit reads format {FORMAT}; use the version that "
                "its provenance.json names, or train it again"
            )
        check_settings(folder)
        return cls(folder, Config.from_yaml(folder / "config.yaml"))

    def check_writable(self) -> None:
        """Refuses a folder that results cannot be written to, before long work is done for nothing.

        Raises:
            ProbekitError: It belongs to somebody else, or its disk is mounted read-only.
        """
        if not os.access(self.folder, os.W_OK):
            raise ProbekitError(f"{self.folder} cannot be written to; copy it to where you may write")

    # Stages

    def finished(self, stage: str) -> bool:
        """Whether a stage is complete."""
        return stage in read_json(self.folder / "run.json")["stages"]

    def mark_finished(self, stage: str, facts: dict[str, Any]) -> None:
        """Records that a stage is complete, with a few facts about it and the checksums of what it left."""
        state = read_json(self.folder / "run.json")
        files, rows = record_of(self._left_by(stage), self.folder), self.rows_checksum(stage)
        left = {name: value for name, value in (("files", files), ("rows", rows)) if value}
        state["stages"][stage] = left | facts  # those of a stage that was taken over go with it
        write_json(self.folder / "run.json", state)

    def require(self, stage: str) -> None:
        """Refuses to go on without a stage, or with files of it that are damaged.

        Raises:
            ProbekitError: Names the stage or the file, and the command that mends it.
        """
        if not self.finished(stage):
            raise ProbekitError(
                f"{self.folder} lacks the stage {stage!r}; finish it with "
                f"`probekit train --resume --out {self.folder}`"
            )
        if damaged := self._damage(stage):
            path, reason = damaged
            raise ProbekitError(
                f"{path} is not as the stage {stage!r} left it ({reason}); copy the run again, or repeat the "
                f"stage and what builds on it by `probekit train --resume --out {self.folder}`"
            )

    def unfinish_damaged(self) -> dict[str, str]:
        """Takes stages whose files are damaged, and those that build on them, for not finished.

        Returns:
            Why, by stage.
        """
        state = read_json(self.folder / "run.json")
        why: dict[str, str] = {}
        for stage in stages_of(self.config):
            if stage not in state["stages"]:
                continue
            if damaged := self._damage(stage):
                why[stage] = f"{damaged[0]} is damaged: {damaged[1]}"
            elif redone := [name for name in stages_before(self.config, stage) if name in why]:
                why[stage] = f"it builds on {redone[0]}"
        if why:
            state["stages"] = {name: facts for name, facts in state["stages"].items() if name not in why}
            write_json(self.folder / "run.json", state)
        return why

    def _damage(self, stage: str) -> tuple[Path, str] | None:
        """The first damaged file of a stage, and why; None where none is, or none was recorded."""
        files: Record = read_json(self.folder / "run.json")["stages"][stage].get("files", {})
        return first_damaged(files, self.folder)

    def difference(self, stage: str, config: Config) -> str | None:
        """A setting of a finished stage that is another one now, with what it was; None if there is none."""
        facts = read_json(self.folder / "run.json")["stages"]
        was, now = stage_settings(self.config, stage), stage_settings(config, stage)
        for name in was:
            before, after = was[name], now.get(name, was[name])  # a switch tells what it leaves out
            recorded = facts.get("lm" if name == "lm.name" else stage, {}).get(RECORDED.get(name))
            found = come_to(config).get(name) if recorded else None
            if name == "lm.name" and found and before == after:
                before, after = f"{before} with weights {recorded}", f"{after} with weights {found}"
            elif name == "training.precision" and found:
                before, after = recorded, found
            if before != after:
                return f"{name} was {before!r} and is now {after!r}"
        return None

    def files_of(self, stage: str) -> list[Path]:
        """The files and folders that a stage has left, checkpoints too."""
        return [*self._left_by(stage), *self.checkpoints_of(stage).glob("step*")]

    def _left_by(self, stage: str) -> list[Path]:
        name = _files_of(stage)
        return [*self.folder.glob(name), *self.folder.glob(f"{name}.*")]

    def begin_stage(self, stage: str, after: int = 0) -> None:
        """Removes what a stage that was stopped has left, but what it goes on from.

        Args:
            stage: Which one.
            after: The step that it goes on behind; 0: it begins anew.
        """
        self.forget_metrics(stage, after)
        if not after:
            shutil.rmtree(self.checkpoints_of(stage), ignore_errors=True)
        clear_temporaries(self.checkpoints_of(stage))
        files = self.folder / _files_of(stage)
        clear_temporaries(files.parent, files.name)
        for name in (*BEGUN, "metrics.jsonl"):
            clear_temporaries(self.folder, name)

    @contextmanager
    def checkpoint(self, stage: str, step: int, facts: Mapping[str, Any]) -> Iterator[Self]:
        """A run as this one is behind a step of a stage; the block puts the stage's files into it.

        Stages before it are linked, so that it is a whole run, and takes the place of its own files alone.

        Args:
            stage: Which one.
            step: Behind which step it stands.
            facts: What is recorded of the stage.
        """
        with atomic_folder(self.checkpoints_of(stage) / f"step{step:07d}") as folder:
            for name in BEGUN[:2]:
                link_or_copy(self.folder / name, folder / name)
            write_json(folder / "run.json", {"format": FORMAT, "stages": {}})
            run = type(self)(folder, self.config)
            for before in stages_before(self.config, stage):
                if self.finished(before):
                    run.take_over(before, self)
            yield run
            run.mark_finished(stage, {"step": step, **facts})

    def checkpoints(self, stage: str) -> dict[int, Path]:
        """The runs that were kept on the way, by the stage's step behind which they were."""
        kept = sorted(self.checkpoints_of(stage).glob("step*/run.json"))
        return {int(path.parent.name.removeprefix("step")): path.parent for path in kept}

    def take_over(self, stage: str, other: RunFolder) -> bool:
        """Takes a finished stage of another run, trained with equal settings, instead of training it.

        Its files are linked or copied; `run.json` says where they come from.

        Returns:
            Whether the other run has them still.
        """
        files = other.files_of(stage)
        if not files:
            return False
        self.begin_stage(stage)
        for path in files:
            link_or_copy(path, self.folder / path.relative_to(other.folder))
        if (other.folder / "metrics.jsonl").exists():
            for row in read_rows(other.folder / "metrics.jsonl"):
                if row["stage"] == stage:
                    self.log(row)
        facts = read_json(other.folder / "run.json")["stages"][stage]
        origin = os.path.relpath(other.folder.resolve(), self.folder.resolve())
        self.mark_finished(stage, facts | {"taken_from": origin})
        return True

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def forget_metrics(self, stage: str, after: int = 0) -> None:
        """Drops a stage's rows behind a step from metrics.jsonl, before the stage goes on from there."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [row for row in read_rows(path) if row["stage"] != stage or row["step"] <= after]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _check_same(begun: RunFolder, wanted: Config) -> None:
    """Stages already done hold only for the settings they were done with; what comes after may differ."""
    for stage in read_json(begun.folder / "run.json")["stages"]:
        if difference := begun.difference(stage, wanted):
            raise ProbekitError(
                f"{begun.folder} was begun with other settings: {difference}, and a stage that uses it is "
                "finished; resume with what it was, or choose another --out"
            )


def _files_of(stage: str) -> str:
    """Where a stage's files are in a run's folder: one of this name, others with suffixes behind it."""
    return {"planner": "planner/model"}.get(stage, stage.replace("adapter/", "adapters/"))


def _was_hardly_begun(folder: Path) -> bool:
    """Whether a folder is empty but for what a run leaves that is killed before its last file is there."""
    targets = {path.name: TEMPORARY.fullmatch(path.name) for path in folder.iterdir()}
    whole = {name for name, target in targets.items() if not target}
    leftovers = {target[1] for target in targets.values() if target}
    return whole in ({*BEGUN[:n]} for n in range(len(BEGUN))) and leftovers <= {*BEGUN}


def _empty(folder: Path) -> None:
    """Removes all that a run holds but its beginning; killed meanwhile, it is a run without stages."""
    write_json(folder / "run.json", {"format": FORMAT, "stages": {}})
    for path in folder.iterdir():
        if path.name not in BEGUN:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
