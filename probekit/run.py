"""A run's folder: what is in it, how it is begun, read back and marked as it grows.

config.yaml       complete settings          planner/      planner weights
provenance.json   versions, commit, seeds    adapters/     one file for each variant, joint ones with planner
run.json          format, finished stages    metrics.jsonl losses of every stage
corpus/           tokens, labels, codebook   evaluation.json, probes/, figures/
lm/               the base LM, in Hugging Face format, or the name and revision of a pre-trained one
adapters/V/       the LM of variant V, if it was tuned: low-rank updates, or all weights
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from probekit.config import Config, ProbedName, VariantName
from probekit.corpus.embeddings import SentenceEncoder, load_encoder
from probekit.corpus.store import Corpus
from probekit.devices import compute_device
from probekit.errors import ProbekitError
from probekit.models.base_lm import TUNINGS, BaseLM
from probekit.models.conditioning import new_adapter
from probekit.models.language_model import load_model, locations, random_weights
from probekit.models.mixing import VARIANTS
from probekit.models.plain import ForwardPass
from probekit.models.planned_lm import PlannedLM
from probekit.models.planner import Planner
from probekit.models.sentence_encoder import TrainableEncoder
from probekit.progress import without_bars_of_transformers
from probekit.stage_settings import stage_settings
from probekit.storage import (
    link_or_copy,
    read_array,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)

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

LOADED = ("device", "corpus", "locations", "_base")
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

    def take_over(self, stage: str, other: Run) -> None:
        """Takes a finished stage of another run, trained with equal settings, instead of training it.

        Its files are linked or copied; `run.json` says where they come from.
        """
        name = {"planner": "planner/model"}.get(stage, stage.replace("adapter/", "adapters/"))
        for path in [*other.folder.glob(name), *other.folder.glob(f"{name}.*")]:
            link_or_copy(path, self.folder / path.relative_to(other.folder))
        self.forget_metrics(stage)
        if (other.folder / "metrics.jsonl").exists():
            for row in _read_rows(other.folder / "metrics.jsonl"):
                if row["stage"] == stage:
                    self.log(row)
        facts = read_json(other.folder / "run.json")["stages"][stage]
        origin = os.path.relpath(other.folder.resolve(), self.folder.resolve())
        self.mark_finished(stage, facts | {"taken_from": origin})

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

    @property
    def bridged(self) -> TransformerBridge:
        """The base LM, frozen and bridged."""
        return self._base.bridged

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
    def _base(self) -> BaseLM:
        self.require("lm")
        return BaseLM(lambda: self.plain_model().to(self.device), self.corpus.tokenizer, self.folder / "lm")

    def base_lm(self, variant: ProbedName = "none", seed: int = 0) -> BaseLM:
        """The LM of a variant, without its adapter: plain, bridged, and with hooks.

        Args:
            variant: `none`, a trained variant, whose LM is its own where that was tuned with the adapter
                (`training.base`), or `random`.
            seed: Of random weights.
        """
        base = self._base
        if variant == "random":
            return BaseLM(
                lambda: random_weights(base.plain, seed).to(self.device),
                self.corpus.tokenizer,
                "random weights",
                alike=base,
            )
        if variant == "none" or self.config.training.base.tuning == "frozen":
            return base
        self.require(f"adapter/{variant}")
        return self._tuned(variant)

    @cached_property
    def _latest(self) -> dict[VariantName, BaseLM]:
        """The tuned LM that was asked for last: all of them may not fit into memory."""
        return {}

    def _tuned(self, variant: VariantName) -> BaseLM:
        settings, folder = self.config.training.base, self.tuned_folder(variant)

        def load() -> PreTrainedModel:
            return TUNINGS[settings.tuning].load(folder, self.plain_model(), settings).to(self.device)

        if variant not in self._latest:
            self._latest.clear()
            self._latest[variant] = BaseLM(load, self.corpus.tokenizer, folder, alike=self._base)
        return self._latest[variant]

    def tuned_folder(self, variant: VariantName) -> Path:
        """Where a variant's own base LM is, if it has one."""
        return self.folder / "adapters" / variant

    def forward_pass(self, names: Sequence[str], variant: ProbedName = "none", seed: int = 0) -> ForwardPass:
        """The fastest way to run a variant's LM with some hooks.

        Args:
            names: The hooks' full TransformerLens names.
            variant: Whose LM, as `base_lm` has it.
            seed: Of random weights.
        """
        return self.base_lm(variant, seed).forward_pass(names)

    def weights_digest(self, variant: str) -> str:
        """A digest of the files that hold a variant's weights, or that name where the LM's are."""
        files = sorted((self.folder / "lm").glob("*"))
        if (self.folder / "lm" / "source.json").exists():
            source = Path(read_json(self.folder / "lm" / "source.json")["name"])
            if source.is_dir():
                files += sorted(path for path in source.iterdir() if path.suffix in WEIGHTS)
        if variant in VARIANTS:
            files += [self.folder / "planner" / "model.safetensors", self._adapter_file(variant)]
            files += sorted(self.folder.glob(f"adapters/{variant}/*"))
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def planner(self, variant: VariantName | None = None) -> Planner:
        """A copy of the planner as its own stage left it, or as a joint variant did."""
        self.require("planner")
        planner = self._planner("model")
        if variant in VARIANTS and VARIANTS[variant].joint:
            _load(planner, self._adapter_file(variant), "planner.")
        return planner

    def _planner(self, name: str) -> Planner:
        planner = Planner(self.config.planner, self._centroids, self.config.seed)
        _load(planner, self.folder / "planner" / f"{name}.safetensors")
        return planner.to(self.device).eval().requires_grad_(False)

    def fold_planner(self, fold: int) -> Planner:
        """The planner that has not seen the training documents of a fold."""
        self.require(f"planner/fold{fold}")
        return self._planner(f"fold{fold}")

    def save_planner(self, planner: Planner, fold: int | None = None) -> None:
        """Writes the weights of the planner, or of one that has not seen a fold."""
        name = "model" if fold is None else f"fold{fold}"
        write_tensors(self.folder / "planner" / f"{name}.safetensors", planner.state_dict())

    def model(self, variant: VariantName) -> PlannedLM:
        """The trained, frozen model of a variant; `none` is the base LM alone.

        Raises:
            ProbekitError: The settings have no such variant, or it is not trained yet.
        """
        known = ("none", *self.config.mixing.variants)
        if variant not in known:
            raise ProbekitError(f"{self.folder} has no variant {variant!r}; it has {', '.join(known)}")
        bridged = self.base_lm(variant).bridged
        adapter = None
        if variant != "none":
            self.require(f"adapter/{variant}")
            adapter = new_adapter(self.config.conditioning, self._centroids, bridged, self.config.seed)
            _load(adapter, self._adapter_file(variant), "adapter.")
            adapter.to(self.device).requires_grad_(False)
        planner = self.planner(variant) if self.finished("planner") else None
        return PlannedLM(bridged, planner, adapter, self.temperature(variant)).eval()

    def temperature(self, variant: VariantName) -> float:
        """Of a variant's mixing: as it was trained, or the setting's."""
        settings = self.config.mixing
        if not settings.learn_temperature or variant not in VARIANTS or not VARIANTS[variant].tempered:
            return settings.temperature
        learned = read_tensors(path := self._adapter_file(variant)).get("log_temperature")
        if learned is None:
            raise ProbekitError(
                f"{path} holds no temperature, but mixing.learn_temperature is true; delete it and train "
                "that stage again"
            )
        return learned.exp().item()

    def encoder(self, variant: VariantName = "none") -> SentenceEncoder | TrainableEncoder:
        """What embeds the sentences that a variant's planner reads: the corpus's encoder, or its own."""
        with without_bars_of_transformers():
            encoder = load_encoder(self.folder / "corpus" / "encoder", str(self.device))
        if not self._has_own_encoder(variant):
            return encoder
        trained = TrainableEncoder(encoder)
        _load(trained, self._adapter_file(variant), "encoder.")
        return trained.to(self.device).eval().requires_grad_(False)

    def corpus_of(self, variant: VariantName) -> Corpus:
        """The corpus as a variant's planner reads it: with the embeddings of its own encoder, if it has one.

        All else is the same: the actions stay those of the corpus's encoder.
        """
        if not self._has_own_encoder(variant):
            return self.corpus
        return replace(self.corpus, embeddings=read_array(self.embeddings_file(variant)))

    def embeddings_file(self, variant: VariantName) -> Path:
        """Where the embeddings of all sentences by a variant's own encoder are."""
        return self.folder / "adapters" / f"{variant}.embeddings.npy"

    def _has_own_encoder(self, variant: VariantName) -> bool:
        joint = variant in VARIANTS and VARIANTS[variant].joint
        return joint and self.config.training.joint.encoder == "trained"

    def save_adapter(self, variant: VariantName, model: PlannedLM) -> None:
        """Writes a variant's adapter, and its planner, temperature and encoder if they were trained too."""
        assert model.adapter is not None  # noqa: S101 - only trained variants are saved
        tensors = {f"adapter.{name}": value for name, value in model.adapter.state_dict().items()}
        if VARIANTS[variant].joint and model.planner is not None:
            tensors |= {f"planner.{name}": value for name, value in model.planner.state_dict().items()}
        if model.log_temperature is not None:
            tensors["log_temperature"] = model.log_temperature
        if model.encoder is not None:
            # Copied: safetensors refuses weights that some models have twice.
            tensors |= {f"encoder.{name}": t.clone() for name, t in model.encoder.state_dict().items()}
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

    def generation_metrics(self) -> dict[str, Any]:
        """What `probekit evaluate --generation` found."""
        if not (self.folder / "generation.json").exists():
            raise ProbekitError(
                f"{self.folder} has no generation.json; run `probekit evaluate {self.folder} --generation`"
            )
        return read_json(self.folder / "generation.json")

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


def _check_same(begun: Run, wanted: Config) -> None:
    """Stages already done hold only for the settings they were done with; what comes after may differ."""
    for stage in read_json(begun.folder / "run.json")["stages"]:
        was, now = stage_settings(begun.config, stage), stage_settings(wanted, stage)
        for name in was | now:
            if was.get(name) != now.get(name):
                raise ProbekitError(
                    f"{begun.folder} was begun with other settings: {name} was {was.get(name)!r} and is now "
                    f"{now.get(name)!r}, and a stage that uses it is finished; resume without it, or choose "
                    "another --out"
                )
