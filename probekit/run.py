"""A run's folder: what is in it, how it is begun, read back and marked as it grows.

config.yaml       complete settings          planner/      planner weights
provenance.json   versions, commit, seeds    adapters/     one file for each variant, joint ones with planner
run.json          format, finished stages    metrics.jsonl losses of every stage
corpus/           tokens, labels, codebook   evaluation.json, probes/, figures/
lm/               the base LM, in Hugging Face format, or the name and revision of a pre-trained one
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from probekit.config import Config, VariantName
from probekit.corpus.store import Corpus
from probekit.devices import compute_device
from probekit.errors import ProbekitError
from probekit.models.conditioning import new_adapter
from probekit.models.language_model import bridge, load_model, locations, random_weights
from probekit.models.mixing import VARIANTS
from probekit.models.plain import BridgedPass, ForwardPass, PlainPass, forward_pass
from probekit.models.planned_lm import PlannedLM
from probekit.models.planner import Planner
from probekit.progress import without_bars_of_transformers
from probekit.storage import read_json, read_tensors, write_json, write_tensors, write_text

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

FORMAT = 1
"""Version of the folder's layout; other versions are refused, not guessed at."""

BEGUN = ("config.yaml", "provenance.json", "run.json")
"""Files of every run from its beginning; a folder without them is never overwritten."""

END_OF_SETTINGS = b"\n...\n"
"""How config.yaml ends when it is whole."""

LOADED = ("device", "corpus", "bridged", "locations", "_plain")
"""What a run keeps in memory once it was asked for."""

WEIGHTS = (".json", ".safetensors", ".bin")
"""Files of a pre-trained LM's folder that say what it computes."""

Existing = Literal["refuse", "resume", "overwrite"]


class Run:
    """A run's folder, open for reading and for stages to be added.

    Attributes:
        folder: Where it is.
        config: Its complete settings.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = config

    @classmethod
    def begin(cls, folder: str | Path, config: Config | None, existing: Existing = "refuse") -> Run:
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
        if is_run and existing != "overwrite":
            raise ProbekitError(
                f"{folder} holds a run already; go on with it by --resume, replace it by --overwrite, or "
                "choose another --out"
            )
        if config is None:
            raise ProbekitError(f"{folder} holds no run to resume; give --preset or --config to begin one")
        if not is_run and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ProbekitError(f"{folder} exists and holds no run; choose another --out")
        origin = provenance(config)  # refuses a device that is not there, before anything is touched
        if is_run:
            shutil.rmtree(folder.resolve())
        try:
            folder.resolve().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProbekitError(
                f"--out {folder}: cannot be made ({error.strerror}); choose another"
            ) from None
        write_text(folder / "config.yaml", config.to_yaml())
        write_json(folder / "provenance.json", origin)
        write_json(folder / "run.json", {"format": FORMAT, "stages": {}})
        return cls(folder, config)

    @classmethod
    def _resume(cls, folder: Path, config: Config | None) -> Run:
        run = cls.open(folder)
        if config is None or config == run.config:
            return run
        _check_same(run, config)
        if not read_json(folder / "run.json")["stages"]:  # as good as begun anew, with other seeds perhaps
            write_json(folder / "provenance.json", provenance(config))
        write_text(folder / "config.yaml", config.to_yaml())
        return cls(folder, config)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Opens a run's folder.

        Raises:
            ProbekitError: It is not a run, one of another version, or a damaged one.
        """
        folder = Path(folder)
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
        settings = folder / "config.yaml"
        if settings.is_file() and not settings.read_bytes().endswith(END_OF_SETTINGS):
            raise ProbekitError(
                f"{settings} is cut off: its last line must be '...'; copy or train the run again"
            )
        return cls(folder, Config.from_yaml(settings))

    def with_settings(self, settings: Mapping[str, Any]) -> Run:
        """The same run, with settings replaced by dotted name for what is done with it now.

        What is loaded already is shared, unless a setting says where or what to load.
        """
        run = Run(self.folder, self.config.override(settings))
        if (run.config.device, run.config.lm) == (self.config.device, self.config.lm):
            vars(run).update({name: vars(self)[name] for name in LOADED if name in vars(self)})
        return run

    # Stages

    def finished(self, stage: str) -> bool:
        """Whether a stage is complete."""
        return stage in read_json(self.folder / "run.json")["stages"]

    def mark_finished(self, stage: str, facts: dict[str, Any]) -> None:
        """Records that a stage is complete, with a few facts about it."""
        state = read_json(self.folder / "run.json")
        state["stages"][stage] = facts
        write_json(self.folder / "run.json", state)

    def require(self, stage: str) -> None:
        """Refuses to go on without a stage.

        Raises:
            ProbekitError: Names the stage and the command that adds it.
        """
        if not self.finished(stage):
            raise ProbekitError(
                f"{self.folder} lacks the stage {stage!r}; finish it with "
                f"`probekit train --resume --out {self.folder}`"
            )

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def forget_metrics(self, stage: str) -> None:
        """Drops a stage's rows from metrics.jsonl, before the stage is begun again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [row for row in _read_rows(path) if row["stage"] != stage]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    # What stages write and others read

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        return compute_device(self.config.device)

    @cached_property
    def corpus(self) -> Corpus:
        """The built corpus."""
        self.require("corpus")
        return Corpus.open(self.folder / "corpus")

    @property
    def variants(self) -> list[VariantName]:
        """The variants whose adapters are trained, in the order of the settings."""
        return [v for v in self.config.mixing.variants if v in VARIANTS and self.finished(f"adapter/{v}")]

    @cached_property
    def bridged(self) -> TransformerBridge:
        """The base LM, frozen and bridged."""
        self.require("lm")
        return bridge(self.plain_model().to(self.device), self.corpus.tokenizer, self.folder / "lm")

    @cached_property
    def locations(self) -> dict[str, int]:
        """Every location of the LM that holds a vector for each position, and the vector's features."""
        return locations(self.bridged)

    def plain_model(self) -> PreTrainedModel:
        """A fresh copy of the base LM as a plain Hugging Face module."""
        folder = self.folder / "lm"
        recorded: dict[str, Any] = {"name": str(folder.resolve()), "revision": None}
        if (folder / "source.json").exists():
            recorded = read_json(folder / "source.json")
        with without_bars_of_transformers():
            return load_model(**recorded, trust_remote_code=self.config.lm.trust_remote_code)

    @cached_property
    def _plain(self) -> PreTrainedModel:
        """A copy of the base LM for forward passes alone."""
        return self.plain_model().to(self.device)

    def forward_pass(self, names: Sequence[str], random_seed: int | None = None) -> ForwardPass:
        """The fastest way to run the base LM with some hooks.

        Args:
            names: The hooks' full TransformerLens names.
            random_seed: Seed of random weights in place of the LM's.
        """
        found = forward_pass(self.bridged, self._plain, names)
        if random_seed is None:
            return found
        model = random_weights(self._plain, random_seed).to(self.device)
        if isinstance(found, PlainPass):
            return found.with_weights(model)
        return BridgedPass(bridge(model, self.corpus.tokenizer, "random weights"))

    def weights_digest(self, variant: str) -> str:
        """A digest of the files that hold a variant's weights, or that name where the LM's are."""
        files = sorted((self.folder / "lm").glob("*"))
        if (self.folder / "lm" / "source.json").exists():
            source = Path(read_json(self.folder / "lm" / "source.json")["name"])
            if source.is_dir():
                files += sorted(path for path in source.iterdir() if path.suffix in WEIGHTS)
        if variant in VARIANTS:
            files += [self.folder / "planner" / "model.safetensors", self._adapter_file(variant)]
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def planner(self, variant: VariantName | None = None) -> Planner:
        """A copy of the planner as its own stage left it, or as a joint variant did."""
        self.require("planner")
        planner = Planner(self.config.planner, self._centroids, self.config.seed)
        _load(planner, self.folder / "planner" / "model.safetensors")
        if variant in VARIANTS and VARIANTS[variant].joint:
            _load(planner, self._adapter_file(variant), "planner.")
        return planner.to(self.device).eval().requires_grad_(False)

    def save_planner(self, planner: Planner) -> None:
        """Writes the planner's weights."""
        write_tensors(self.folder / "planner" / "model.safetensors", planner.state_dict())

    def model(self, variant: VariantName) -> PlannedLM:
        """The trained, frozen model of a variant; `none` is the base LM alone.

        Raises:
            ProbekitError: The settings have no such variant, or it is not trained yet.
        """
        known = ("none", *self.config.mixing.variants)
        if variant not in known:
            raise ProbekitError(f"{self.folder} has no variant {variant!r}; it has {', '.join(known)}")
        adapter = None
        if variant != "none":
            self.require(f"adapter/{variant}")
            adapter = new_adapter(self.config.conditioning, self._centroids, self.bridged, self.config.seed)
            _load(adapter, self._adapter_file(variant), "adapter.")
            adapter.to(self.device).requires_grad_(False)
        planner = self.planner(variant) if self.finished("planner") else None
        return PlannedLM(self.bridged, planner, adapter, self.config.mixing.temperature).eval()

    def save_adapter(self, variant: VariantName, model: PlannedLM) -> None:
        """Writes a variant's adapter, and its planner where that was trained too."""
        assert model.adapter is not None  # noqa: S101 - only trained variants are saved
        tensors = {f"adapter.{name}": value for name, value in model.adapter.state_dict().items()}
        if VARIANTS[variant].joint and model.planner is not None:
            tensors |= {f"planner.{name}": value for name, value in model.planner.state_dict().items()}
        write_tensors(self._adapter_file(variant), tensors)

    # Results as data frames

    def metrics(self) -> pd.DataFrame:
        """The rows of metrics.jsonl."""
        import pandas as pd

        path = self.folder / "metrics.jsonl"
        if not path.exists():
            raise ProbekitError(f"{self.folder} has no metrics yet; train it first")
        return pd.DataFrame(_read_rows(path))

    def evaluation(self) -> dict[str, Any]:
        """What `probekit evaluate` found."""
        if not (self.folder / "evaluation.json").exists():
            raise ProbekitError(f"{self.folder} is not evaluated; run `probekit evaluate {self.folder}`")
        return read_json(self.folder / "evaluation.json")

    def losses(self) -> pd.DataFrame:
        """Test losses by document, variant and source of actions, as `probekit evaluate` left them."""
        return self._table("losses.parquet", "evaluate")

    def probes(self) -> pd.DataFrame:
        """What `probekit probe` found: one row for each reader and cell of the grid."""
        return self._table("probes/results.parquet", "probe")

    def _table(self, name: str, command: str) -> pd.DataFrame:
        import pandas as pd

        path, remedy = self.folder / name, f"run `probekit {command} {self.folder}`"
        if not path.exists():
            raise ProbekitError(f"{path} does not exist; {remedy}")
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise ProbekitError(f"{path} is damaged ({error}); {remedy}") from None

    @property
    def _centroids(self) -> torch.Tensor:
        return torch.from_numpy(self.corpus.codebook.centroids)

    def _adapter_file(self, variant: str) -> Path:
        return self.folder / "adapters" / f"{variant}.safetensors"


def _load(module: torch.nn.Module, path: Path, prefix: str = "") -> None:
    """Loads a module from the tensors of a file whose names begin with the prefix."""
    tensors = read_tensors(path)
    try:
        module.load_state_dict(
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        )
    except RuntimeError:
        raise ProbekitError(
            f"{path} does not fit the run's settings; delete it and train that stage again"
        ) from None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last one that an interruption cut off is left out."""
    try:
        *whole, _ = path.read_text("utf-8").split("\n")
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ProbekitError(f"{path} is damaged ({error}); delete it") from None


def provenance(config: Config) -> dict[str, Any]:
    """Where a run comes from: versions, commit, seeds and machine."""
    packages = ("probekit", "torch", "transformers", "transformer-lens", "datasets", "scikit-learn", "numpy")
    return {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "git_commit": _git_commit(),
        "seeds": {"run": config.seed, "corpus": config.corpus.seed, "planted": config.corpus.planted.seed},
        "device": str(compute_device(config.device)),
        "machine": {
            "processor": platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that this file is in; None where probekit is installed as a package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    git = shutil.which("git")
    if git is None:
        return None
    answer = subprocess.run(  # noqa: S603 - fixed arguments
        [git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None


USED_BY = {
    "device": None,
    "evaluation": None,
    "generation": None,
    "probe": None,
    "mixing.variants": None,
    "mixing": "adapter/",
    "conditioning": "adapter/",
    "training.joint": "adapter/",
    "training.base": "adapter/",
    "training.adapter": "adapter/",
    "training.planner": "planner",
    "planner": "planner",
    # A new LM needs the corpus, so its stage comes after; a pre-trained one is there before.
    "corpus": "corpus",
    "actions": "corpus",
}
"""Sections that only a late stage uses, more special ones first; all other settings any stage may use."""


def _check_same(begun: Run, wanted: Config) -> None:
    """Stages already done hold only for the settings they were done with; what comes after may differ."""
    stages = read_json(begun.folder / "run.json")["stages"]
    for name, was, now in _differences(begun.config.model_dump(), wanted.model_dump()):
        user = next((USED_BY[section] for section in USED_BY if f"{name}.".startswith(f"{section}.")), "")
        if user is not None and any(stage.startswith(user) for stage in stages):
            raise ProbekitError(
                f"{begun.folder} was begun with other settings: {name} was {was!r} and is now {now!r}, and a "
                "stage that uses it is finished; resume without it, or choose another --out"
            )


def _differences(
    first: dict[str, Any], second: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    found = []
    for key, value in first.items():
        if isinstance(value, dict):
            found += _differences(value, second[key], f"{prefix}{key}.")
        elif value != second[key]:
            found.append((prefix + key, value, second[key]))
    return found
