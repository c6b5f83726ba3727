"""A run's folder: what is in it, how it is begun, resumed and read, and which stages are finished.

config.yaml       complete settings          planner/      planner weights
provenance.json   versions, commit, machine  adapters/     one file for each variant, joint ones with planner
run.json          finished stages            metrics.jsonl losses of every stage
corpus/           tokens, labels, codebook   figures/      pictures of probes and interventions
evaluation.json   what `evaluate` measures; losses.parquet by document, choices.parquet by question
generation.json   what is measured of written text; generation.parquet by document
probes/           results and weights of probes
activations/V-S/  activations of variant V and seed S, where `probe --store` keeps them
lm/               the base LM, in Hugging Face format, or the name and revision of a pre-trained one
adapters/V/       the LM of variant V, if it was tuned: low-rank updates, or all weights
interventions/V/  what interventions in variant V found
subnetworks/V/    which components of variant V the next action's information needs
continuation/     what the LM writes after one activation alone
in_context/       what examples in the prompt are worth
depth/            one file for each member of a depth ensemble; depth/M/ its LM, if it was tuned
checkpoints/S/    of stage S: the state that --resume goes on from, and the runs kept at some steps
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from probekit import distributed
from probekit.config import Config, user_path
from probekit.distributed import compute_device, precision_of
from probekit.errors import ProbekitError
from probekit.io import (
    atomic_folder,
    clear_temporaries,
    link_or_copy,
    locked,
    read_json,
    read_table,
    write_json,
    write_text,
)
from probekit.run.stages import stage_settings, stages_before

if TYPE_CHECKING:
    import pandas as pd


PACKAGES = ("probekit-lm", "torch", "transformers", "transformer-lens", "datasets", "scikit-learn", "numpy")
"""What results depend on."""

WEIGHTS = (".json", ".safetensors", ".bin")
"""Suffixes of the files of a pre-trained LM's folder that decide what it computes."""

READ_WHOLE = 1 << 26
ENDS = 1 << 20
"""Files above 64 MiB are digested by their size and a MiB at either end."""


def provenance(config: Config) -> dict[str, Any]:
    """Where a run comes from: versions, commit and machine; seeds are settings."""
    return {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": installed_versions(),
        "git_commit": _git_commit(),
        "device": str(compute_device(config.device)),
        "machine": {
            "processor": platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
            "processes": distributed.count(),
        },
    }


def installed_versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES}


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def lm_digest(folder: str | Path) -> str | None:
    """A digest of a pre-trained LM's files; None where there is no such folder or file, as for hub names."""
    folder = user_path(folder)
    if folder.is_file():
        return digest_of([folder])
    if not folder.is_dir():
        return None
    return digest_of(sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS))


def digest_of(files: Iterable[Path]) -> str:
    """A digest of files in their order, large ones by their ends."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= READ_WHOLE:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(size.to_bytes(8, "big") + file.read(ENDS))
                file.seek(size - ENDS)
                digest.update(file.read(ENDS))
    return digest.hexdigest()[:16]


def _git_commit() -> str | None:
    """The commit of the checkout that this file is in; None where probekit is installed as a package."""
    root = Path(__file__).parents[2]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    answer = subprocess.run(  # noqa: S603 - fixed arguments
        [git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None


FORMAT = 3
"""Version of the folder's layout; other versions are refused."""

FIRST_FILES = ("provenance.json", "config.yaml", "run.json")
"""Files of every run from its beginning; a folder without them is never overwritten."""

SWEEP = "sweep.json"
"""What a sweep's folder has in place of a run's `run.json`."""

Existing = Literal["refuse", "resume", "overwrite"]


class RunFolder:
    """A run's folder, open for reading and for stages to be added.

    Attributes:
        folder: Where it is.
        config: Its complete settings.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = config

    def __repr__(self) -> str:
        """The folder, and what is finished."""
        finished = ", ".join(self.stages) if (self.folder / "run.json").exists() else "gone"
        return f"{type(self).__name__}({str(self.folder)!r}, {finished or 'nothing finished'})"

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Opens a run's folder.

        Raises:
            ProbekitError: It is not a run, or one of another version.
        """
        folder = user_path(folder).absolute()
        if (folder / SWEEP).is_file():
            runs = sorted(str(path.parent) for path in folder.glob("*/seed*/run.json"))
            shown = ", ".join([*runs[:3], *(["…"] if len(runs) > 3 else [])])
            raise ProbekitError(f"{folder} is a sweep; its runs are {shown or 'not begun yet'}")
        if not (folder / "run.json").is_file():
            what = "does not exist" if not folder.exists() else "holds no run (no run.json)"
            raise ProbekitError(f"{folder} {what}; make one with `probekit train --out {folder}`")
        if (found := read_json(folder / "run.json").get("format")) != FORMAT:
            raise ProbekitError(
                f"{folder} has run format {found}, this probekit reads format {FORMAT}; use the version that "
                "its provenance.json names, or train it again"
            )
        settings = folder / "config.yaml"
        # `to_yaml` writes an end mark: the first half of a YAML file may be valid, with other settings.
        if settings.is_file() and not settings.read_bytes().rstrip().endswith(b"\n..."):
            raise ProbekitError(f"{settings} is cut off: it must end in a line '...'; copy the run again")
        return cls(folder, Config.from_yaml(settings))

    @classmethod
    @contextmanager
    def begin_locked(
        cls, folder: str | Path, config: Config | None, existing: Existing = "refuse"
    ) -> Iterator[Self]:
        """Begins or resumes a run as `begin` does, and keeps its folder locked until the block is left."""
        with ExitStack() as stack:
            folder = user_path(folder).absolute()
            if there := folder.is_dir():
                stack.enter_context(locked(folder))
            run = cls.begin(folder, config, existing)
            if not there:
                stack.enter_context(locked(run.folder))
            yield run

    @classmethod
    def begin(cls, folder: str | Path, config: Config | None, existing: Existing = "refuse") -> Self:
        """Begins a run, or resumes one.

        Args:
            folder: The run's folder.
            config: Its settings; None takes those of the run that is resumed.
            existing: What to do if the folder holds a run; one that has done nothing yet is begun anew.

        Raises:
            ProbekitError: The folder exists and `existing` refuses it, it is no run, or it was begun with
                other settings.
        """
        folder = user_path(folder).absolute()
        config = config and config.with_absolute_paths()
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        is_run = names.issuperset(FIRST_FILES)
        if is_run and existing == "resume":
            return cls._resume(folder, config)
        if is_run and len(names) > len(FIRST_FILES) and existing == "refuse":
            raise ProbekitError(
                f"{folder} holds a run already; go on with it by --resume, replace it by --overwrite, or "
                "choose another --out"
            )
        if config is None:
            raise ProbekitError(f"{folder} holds no run to resume; give --preset or --config to begin one")
        if folder.exists() and not is_run and (names or not folder.is_dir()):
            raise ProbekitError(f"{folder} exists and holds no run; choose another --out")

        origin = provenance(config)  # refuses a device that is not there, before anything is touched
        try:
            with nullcontext(folder) if folder.exists() else atomic_folder(folder) as files:
                write_json(files / "run.json", {"format": FORMAT, "stages": {}})
                for path in (folder / name for name in names.difference(FIRST_FILES)):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                write_json(files / "provenance.json", origin)
                write_text(files / "config.yaml", config.to_yaml())
        except OSError as error:
            raise ProbekitError(
                f"--out {folder}: cannot be made ({error.strerror}); choose another"
            ) from None
        return cls(folder, config)

    @classmethod
    def _resume(cls, folder: Path, config: Config | None) -> Self:
        run = cls.open(folder)
        run.check_writable()
        config = config or run.config
        # Finished stages hold only for the settings that they were trained with; later ones may differ.
        for stage in run.stages:
            if difference := run.difference(stage, config):
                raise ProbekitError(
                    f"{folder} was begun with other settings: {difference}, and a stage that uses it is "
                    "finished; resume with the earlier value, or choose another --out"
                )
        if config != run.config:
            if not run.stages:
                write_json(folder / "provenance.json", provenance(config))
            write_text(folder / "config.yaml", config.to_yaml())
        return cls(folder, config)

    def check_writable(self) -> None:
        """Refuses a folder that results cannot be written to, before long work is done for nothing."""
        if not os.access(self.folder, os.W_OK):
            raise ProbekitError(f"{self.folder} cannot be written to; copy it to where you may write")

    # Stages

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The finished stages, with a few facts about each."""
        return read_json(self.folder / "run.json")["stages"]

    def finished(self, stage: str) -> bool:
        """Whether a stage is complete."""
        return stage in self.stages

    def require(self, stage: str) -> None:
        """Refuses to go on without a stage.

        Raises:
            ProbekitError: Names the stage and the command that finishes it.
        """
        if not self.finished(stage):
            raise ProbekitError(
                f"{self.folder} lacks the stage {stage!r}; finish it with "
                f"`probekit train --resume --out {self.folder}`"
            )

    def begin_stage(self, stage: str, after: int = 0) -> None:
        """Removes what a stage that was stopped has left, except for what it goes on from.

        Args:
            stage: Which one.
            after: The step after which it goes on; 0: it begins anew.
        """
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            kept = [row for row in _rows(metrics) if row["stage"] != stage or row["step"] <= after]
            write_text(metrics, "".join(json.dumps(row) + "\n" for row in kept))
        if not after:
            shutil.rmtree(self.checkpoints_of(stage), ignore_errors=True)
        clear_temporaries(self.checkpoints_of(stage))
        files = self.folder / _files_of(stage)
        clear_temporaries(files.parent, files.name)
        for name in (*FIRST_FILES, metrics.name):
            clear_temporaries(self.folder, name)

    def mark_finished(self, stage: str, facts: dict[str, Any]) -> None:
        """Records that a stage is complete, with a few facts about it."""
        write_json(self.folder / "run.json", {"format": FORMAT, "stages": self.stages | {stage: facts}})

    def difference(self, stage: str, config: Config) -> str | None:
        """The first setting of a finished stage that `config` changes, with both values, if there is one."""
        before, now = stage_settings(self.config, stage), stage_settings(config, stage)
        if (precision := self.stages[stage].get("precision")) is not None:  # what `auto` stood for
            before["training.precision"] = precision
            now["training.precision"] = precision_of(compute_device(config.device), config.training.precision)
        for name, value in before.items():
            if now.get(name, value) != value:  # a setting that another one switched off is missing
                return f"{name} was {value!r} and is now {now[name]!r}"
        return None

    def files_of(self, stage: str) -> list[Path]:
        """The files and folders that a stage has left, its checkpoints included."""
        name = _files_of(stage)
        patterns = (name, f"{name}.*", f"checkpoints/{stage}/step*")
        return [path for pattern in patterns for path in self.folder.glob(pattern)]

    def take_over(self, stage: str, other: RunFolder) -> bool:
        """Takes a finished stage of another run, trained with equal settings, instead of training it.

        Its files are linked or copied; `run.json` says where they come from.

        Returns:
            Whether the other run still has them.
        """
        files = other.files_of(stage)
        if not files:
            return False
        self.begin_stage(stage)
        for path in files:
            link_or_copy(path, self.folder / path.relative_to(other.folder))
        if (other.folder / "metrics.jsonl").exists():
            for row in _rows(other.folder / "metrics.jsonl"):
                if row["stage"] == stage:
                    self.log(row)
        origin = os.path.relpath(other.folder.resolve(), self.folder.resolve())
        self.mark_finished(stage, other.stages[stage] | {"taken_from": origin})
        return True

    # Checkpoints

    def checkpoints_of(self, stage: str) -> Path:
        """The folder of a stage's checkpoints."""
        return self.folder / "checkpoints" / stage

    def checkpoints(self, stage: str) -> dict[int, Path]:
        """The runs that a stage kept while it was trained, by the stage's step."""
        kept = sorted(self.checkpoints_of(stage).glob("step*/run.json"))
        return {int(path.parent.name.removeprefix("step")): path.parent for path in kept}

    @contextmanager
    def checkpoint(
        self, stage: str, step: int, facts: Mapping[str, Any], config: Config | None = None
    ) -> Iterator[Self]:
        """A run as this one is after a step of a stage; the block writes the stage's files into it.

        The stages before it are hard links: it is a whole run, and takes disk space for its own files alone.

        Args:
            stage: Which one.
            step: The steps that are done.
            facts: What is recorded of the stage.
            config: Its settings; unset: this run's.
        """
        with atomic_folder(self.checkpoints_of(stage) / f"step{step:07d}") as folder:
            link_or_copy(self.folder / "provenance.json", folder / "provenance.json")
            write_text(folder / "config.yaml", (config or self.config).to_yaml())
            write_json(folder / "run.json", {"format": FORMAT, "stages": {}})
            run = type(self)(folder, config or self.config)
            for before in stages_before(self.config, stage):
                if self.finished(before):
                    run.take_over(before, self)
            yield run
            run.mark_finished(stage, {"step": step, **facts})

    # Results

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> pd.DataFrame:
        """The rows of metrics.jsonl."""
        import pandas as pd

        path = self.folder / "metrics.jsonl"
        if not path.exists():
            raise ProbekitError(f"{self.folder} has no metrics yet; train it first")
        return pd.DataFrame(_rows(path))

    def losses_of(self, stage: str) -> pd.DataFrame:
        """A stage's losses in training: columns `step`, `loss` and `validation_loss`.

        There are none of a pre-trained LM.
        """
        import pandas as pd

        columns = ["step", "loss", "validation_loss"]
        if stage == "lm" and self.config.lm.name is not None:
            return pd.DataFrame(columns=columns, dtype=float)
        metrics = self.metrics()
        return metrics[metrics.stage == stage][columns]

    def evaluation(self) -> dict[str, Any]:
        """What `probekit evaluate` found."""
        return read_json(self._result("evaluation.json", "evaluate"))

    def generation_metrics(self) -> dict[str, Any]:
        """What `probekit evaluate --generation` found."""
        return read_json(self._result("generation.json", "evaluate", " --generation"))

    def losses(self) -> pd.DataFrame:
        """Test losses by document, variant and source of actions, by `probekit evaluate`."""
        return read_table(self._result("losses.parquet", "evaluate"))

    def choices(self) -> pd.DataFrame:
        """Which model solves which multiple-choice question, by `probekit evaluate` (depth ensemble)."""
        return read_table(self._result("choices.parquet", "evaluate"))

    def probes(self) -> pd.DataFrame:
        """What `probekit probe` found: one row for each probe or baseline and cell of the grid."""
        return read_table(self._result("probes/results.parquet", "probe"))

    def geometry(self) -> pd.DataFrame:
        """The geometry of the activations that probes read: a row for each variant, layer and position."""
        return read_table(self._result("probes/geometry.parquet", "probe", " --probe.geometry true"))

    def transfer(self) -> pd.DataFrame:
        """What probes of each value of `probe.transfer` read of the others: a row for each two and cell."""
        return read_table(self._result("probes/transfer.parquet", "probe", " --probe.transfer COLUMN"))

    def probes_file(self, stage: str) -> Path:
        """Where the results of probing a stage's checkpoints are."""
        return self.checkpoints_of(stage) / "probes.parquet"

    def probes_over_training(self, stage: str = "lm") -> pd.DataFrame:
        """What `probekit probe --checkpoints` found: the rows of `probes` with the stage's `step`."""
        return read_table(self._result(f"checkpoints/{stage}/probes.parquet", "probe", " --checkpoints"))

    def interventions(self) -> pd.DataFrame:
        """What `probekit intervene` found, by variant: a row for each condition, hook point and metric."""
        return self._of_variants("interventions", "results.parquet", "intervene")

    def continuation(self) -> pd.DataFrame:
        """What `probekit continuation` found: a row for each condition, layer, horizon and metric."""
        return read_table(self._result("continuation/results.parquet", "continuation"))

    def subnetworks(self) -> pd.DataFrame:
        """What `probekit subnetwork` found, by variant: a row for each condition, draw and metric."""
        return self._of_variants("subnetworks", "results.parquet", "subnetwork")

    def subnetwork_masks(self) -> pd.DataFrame:
        """The subnetworks themselves, of all variants: a row for each component."""
        return self._of_variants("subnetworks", "mask.parquet", "subnetwork")

    def _of_variants(self, folder: str, name: str, command: str) -> pd.DataFrame:
        import pandas as pd

        paths = sorted(self.folder.glob(f"{folder}/*/{name}"))
        tables = [read_table(path) for path in paths or [self._result(f"{folder}/none/{name}", command)]]
        return pd.concat(tables, ignore_index=True)

    def _result(self, name: str, command: str, option: str = "") -> Path:
        """A file of results; the error that it is not there names the command that writes it."""
        path = self.folder / name
        if not path.exists():
            raise ProbekitError(f"{path} does not exist; run `probekit {command} {self.folder}{option}`")
        return path


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last one that an interruption cut off is left out."""
    try:
        *whole, _ = path.read_text("utf-8").split("\n")
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ProbekitError(f"{path} is damaged ({error}); delete it") from None


def _files_of(stage: str) -> str:
    """Path of a stage's files in a run's folder, without their endings, such as `planner/model`."""
    return {"planner": "planner/model"}.get(stage, stage.replace("adapter/", "adapters/"))
