"""A run: its folder, and the models that its stages left there, loaded and frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from probekit.config import Config, MemberName, ModelName, ProbedName, VariantName, setting_value
from probekit.data.corpus import Corpus
from probekit.data.encoders import SentenceEncoder, load_encoder
from probekit.distributed import autocast, compute_device
from probekit.errors import ProbekitError
from probekit.io import read_array, read_json, read_tensors, write_tensors
from probekit.models.backends import Backend
from probekit.models.bidirectional import refuse_bidirectional
from probekit.models.compression import compressed
from probekit.models.conditioning import new_adapter
from probekit.models.depth_ensemble import MEMBERS, DepthEnsemble, new_ensemble
from probekit.models.frozen_lm import FrozenLM
from probekit.models.language_model import is_placed, load_model, longest_window, random_weights
from probekit.models.locations import NORM_OUT
from probekit.models.mixing import VARIANTS
from probekit.models.planned_lm import PlannedLM
from probekit.models.planner import Planner, TrainableEncoder
from probekit.models.pretrained import dtype_of, load_config
from probekit.models.tuning import TUNINGS
from probekit.progress import without_bars_of_transformers
from probekit.run.folder import WEIGHTS, RunFolder, digest_of, lm_digest
from probekit.run.stages import stages_of, stages_that_use

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


LOADED = ("device", "dtype", "corpus", "_lm_config", "_lms")
"""Properties that are loaded once and kept in memory."""


HOW_TO_LOAD = ("lm.dtype", "lm.device_map", "lm.trust_remote_code")
"""Settings of an LM that change nothing of what a run holds."""

SAMPLE_TOKENS = 512
"""Tokens of the corpus on which a bridge is compared with the LM itself."""


class Run(RunFolder):
    """A run's folder, and the models that its stages left there."""

    @classmethod
    def at(cls, run: Run | str | Path, settings: Mapping[str, Any] | None = None) -> Run:
        """A run, or that of a folder, with settings replaced by dotted name if there are any."""
        run = run if isinstance(run, Run) else cls.open(run)
        return run.with_settings(settings) if settings else run

    def autocast(self) -> AbstractContextManager[None]:
        """The arithmetic of forward passes (`training.precision`)."""
        return autocast(self.device, self.config.training.precision)

    def with_settings(self, settings: Mapping[str, Any]) -> Run:
        """The same run with settings replaced by dotted name, for what is done with it now.

        What is loaded is shared, unless a setting changes what to load or where.
        """
        run = Run(self.folder, self.config.override(settings))
        self._check_kept(run.config, settings)
        if (run.config.device, run.config.lm) == (self.config.device, self.config.lm):
            vars(run).update({name: vars(self)[name] for name in LOADED if name in vars(self)})
        return run

    def _check_kept(self, config: Config, settings: Mapping[str, Any]) -> None:
        """Refuses to change a setting of the LM or its tokens once a stage that used it is finished."""
        for name in (name for name in settings if name.startswith("lm.") and name not in HOW_TO_LOAD):
            users = {stage.removesuffix("/new") for stage in stages_that_use(name)} & {"corpus", "lm"}
            before, now = (setting_value(each, name) for each in (self.config, config))
            finished = sorted(stage for stage in users if self.finished(stage))
            if before != now and finished:
                raise ProbekitError(
                    f"{name} was {before!r} when the {finished[0]} of {self.folder} was made, and cannot be "
                    f"{now!r} now; leave it out, or make another run"
                )

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
    def members(self) -> list[MemberName]:
        """The members of the depth ensemble that are trained, in the order of the settings."""
        return [member for member in self.config.depth.members if self.finished(f"depth/{member}")]

    def variant_of(self, name: ModelName) -> VariantName:
        """The variant that conditions a model; for a member of a depth ensemble, that of the LM below it."""
        return self.config.depth.variant if name in MEMBERS else name  # type: ignore[return-value]

    @property
    def locations(self) -> dict[str, int]:
        """Locations of the LM with one vector for each position, and the number of its features."""
        return self.frozen_lm().architecture.locations

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype in which the LM's weights are held."""
        return dtype_of(self.config.lm.dtype, self._lm_config, self.device)

    @cached_property
    def _lm_config(self) -> PreTrainedConfig:
        return load_config(**self._lm_source(), trust_remote_code=self.config.lm.trust_remote_code)

    def require_causal(self) -> None:
        """Refuses to go on without an LM, or with one that predicts no next token.

        Raises:
            ProbekitError: There is none, or it is bidirectional.
        """
        self.require("lm")
        refuse_bidirectional(self._lm_config, self.config.lm.name or self.folder)

    def _lm_source(self) -> dict[str, Any]:
        """Where the base LM is: a folder, or a name and revision on the hub."""
        self.require("lm")
        if not (self.folder / "lm" / "source.json").exists():
            return {"name": str((self.folder / "lm").resolve()), "revision": None}
        source = read_json(self.folder / "lm" / "source.json")
        trained_with = self.stages["lm"].get("weights")
        if trained_with is not None and lm_digest(source["name"]) not in (trained_with, None):
            raise ProbekitError(
                f"{source['name']} is not the LM that {self.folder} was made with: its files have "
                "changed; restore them, or train another run"
            )
        return source

    def plain_model(self, name: ModelName = "none", dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A fresh copy of a model's LM as a plain Hugging Face module: the base LM, or as it was tuned.

        Args:
            name: Which one.
            dtype: Of its weights; unset: `Run.dtype`, or float32 if all of its weights were trained.
        """
        settings, stage = self.config.training.base, _stage_of(name)
        if stage is not None and settings.tuning != "frozen":
            self.require(stage)
            below = self.variant_of(name) if name in MEMBERS else "none"
            trained = (
                torch.float32 if (settings.tuning, self.config.lm.dtype) == ("full", "auto") else self.dtype
            )
            return TUNINGS[settings.tuning].load(
                self.tuned_folder(name),
                partial(self.plain_model, below, dtype),
                settings,
                dtype or trained,
                trust_remote_code=self.config.lm.trust_remote_code,
            )
        if name in MEMBERS:
            return self.plain_model(self.variant_of(name), dtype)
        model = load_model(
            **self._lm_source(),
            trust_remote_code=self.config.lm.trust_remote_code,
            device_map=self.config.lm.device_map,
            dtype=dtype or self.dtype,
        )
        return model if self.config.lm.compress is None else compressed(model, self.config.lm.compress)

    def placed_model(self, name: ModelName = "none", dtype: torch.dtype | None = None) -> PreTrainedModel:
        """`plain_model` on the device, or where accelerate placed it; other weights are let go first."""
        self._let_go()
        return self._placed(self.plain_model(name, dtype))

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        return model if is_placed(model) else model.to(self.device)

    def _random_model(self, seed: int) -> PreTrainedModel:
        """The architecture with random weights, made after those of the LM are let go."""
        device_map = None
        if self.config.lm.device_map is not None:
            device_map = self.frozen_lm().plain.hf_device_map
        self._let_go()
        return self._placed(random_weights(self._lm_config, seed, self.dtype, device_map))

    @cached_property
    def _lms(self) -> dict[tuple[Any, ...], FrozenLM]:
        """Every LM that was asked for. The weights of one are in memory: all of them may not fit."""
        return {}

    def _let_go(self) -> None:
        for lm in self._lms.values():
            lm.let_go()

    def frozen_lm(self, name: ProbedName | MemberName = "none", seed: int = 0) -> FrozenLM:
        """The LM of a model, without its adapter and ensemble.

        When its weights are loaded, those of other models are let go.

        Args:
            name: `none`, `random`, or a trained variant or member of a depth ensemble, which has an LM of
                its own if that was tuned with it (`training.base`).
            seed: Seed of random weights.
        """
        stage, settings = _stage_of(name), self.config.training.base
        tuned = stage is not None and settings.tuning != "frozen"
        if tuned and stage is not None:
            self.require(stage)
        key: tuple[Any, ...] = ("none",)
        load, label = partial(self.placed_model, "none"), str(self.folder / "lm")
        if name == "random":
            key, load, label = (name, seed), partial(self._random_model, seed), "random weights"
        elif tuned:
            key, label = (name, settings), str(self.tuned_folder(name))
            load = partial(self.placed_model, name)
        if key not in self._lms:
            self._lms[key] = FrozenLM(
                load,
                self._lm_config,
                self.corpus.tokenizer,
                label,
                None if key == ("none",) else self.frozen_lm(),
                None if self.config.lm.device_map is None else self.device,
                self._sample,
            )
        return self._lms[key]

    @property
    def _sample(self) -> torch.Tensor:
        """Some text of the corpus `[1, positions]`."""
        tokens = self.corpus.tokens[: min(SAMPLE_TOKENS, longest_window(self._lm_config))]
        return torch.from_numpy(tokens.astype(np.int64))[None]

    def tuned_folder(self, name: ModelName) -> Path:
        """Where a model's own tuned LM is, if it has one."""
        return self.folder / ("depth" if name in MEMBERS else "adapters") / name

    def backend_for(
        self, names: Sequence[str], name: ProbedName | MemberName = "none", seed: int = 0
    ) -> Backend:
        """The fastest backend that runs a model's LM with some hooks.

        Args:
            names: The hooks' full TransformerLens names.
            name: The model, as in `frozen_lm`.
            seed: Seed of random weights.
        """
        return self.frozen_lm(name, seed).backend_for(names)

    def weights_digest(self, variant: str) -> str:
        """A digest of what the weights of a variant or of a member of a depth ensemble are made of."""
        files = sorted((self.folder / "lm").glob("*"))
        if (self.folder / "lm" / "source.json").exists():
            source = Path(read_json(self.folder / "lm" / "source.json")["name"])
            files += sorted(path for path in source.glob("*") if path.suffix in WEIGHTS)
            files += [source] if source.is_file() else []
        if variant in MEMBERS:
            files += [self._ensemble_file(variant), *sorted(self.folder.glob(f"depth/{variant}/*"))]
            variant = self.config.depth.variant
        if variant in VARIANTS:
            files += [self.folder / "planner" / "model.safetensors", self._adapter_file(variant)]
            files += sorted(self.folder.glob(f"adapters/{variant}/*"))
        return " ".join([digest_of(files), *filter(None, [self.config.lm.compress])])

    def planner(self, variant: VariantName | None = None) -> Planner:
        """A copy of the planner: of the planner stage, or of a joint variant."""
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

    def model(
        self, name: ModelName, hooks: Sequence[str] = (), plain: PreTrainedModel | None = None
    ) -> PlannedLM:
        """The trained, frozen model of a variant, or of a member of a depth ensemble; `none` is the base LM.

        Args:
            name: Which one.
            hooks: Full names of further hooks that its backend is to have.
            plain: Its LM, if that is in memory already, to be trained.

        Raises:
            ProbekitError: The settings have no such variant or member, or it is not trained yet.
        """
        trained = ["none", *self.variants, *self.members]
        if name not in trained and _stage_of(name) not in stages_of(self.config):
            raise ProbekitError(f"{self.folder} has no variant {name!r}; it has {', '.join(trained)}")
        lm = self.frozen_lm(name)
        variant, adapter, depth = self.variant_of(name), None, None
        if variant != "none":
            self.require(f"adapter/{variant}")
            adapter = new_adapter(self.config.conditioning, self._centroids, lm, self.config.seed)
            _load(adapter, self._adapter_file(variant), "adapter.")
            adapter.to(self.device).requires_grad_(False)
        if name in MEMBERS:
            depth = self._ensemble(name)
        planner = self.planner(variant) if self.finished("planner") else None
        parts = [part for part in (adapter, depth) if part is not None]
        names = [*(hook for part in parts for hook in part.names), *hooks] or [NORM_OUT]
        return PlannedLM(
            lm.backend_for(names, plain), planner, adapter, self.temperature(variant), depth=depth
        ).eval()

    def _ensemble(self, member: MemberName) -> DepthEnsemble:
        self.require(f"depth/{member}")
        lm = self.frozen_lm(member)
        ensemble = new_ensemble(member, self.config.depth, lm, lm.plain, self.config.seed)
        _load(ensemble, self._ensemble_file(member))
        return ensemble.to(self.device).requires_grad_(False)

    def save_ensemble(self, member: MemberName, ensemble: DepthEnsemble) -> None:
        """Writes the norms and the router of a member of the depth ensemble."""
        write_tensors(self._ensemble_file(member), ensemble.state_dict())

    def temperature(self, variant: VariantName) -> float:
        """The temperature of a variant's mixing: learned, or the setting's."""
        settings = self.config.mixing
        if not settings.learn_temperature or variant not in VARIANTS or not VARIANTS[variant].tempered:
            return settings.temperature
        return read_tensors(self._adapter_file(variant))["log_temperature"].exp().item()

    def encoder(self, variant: VariantName = "none") -> SentenceEncoder | TrainableEncoder:
        """The encoder of the sentences that a variant's planner reads: the corpus's, or the variant's own."""
        with without_bars_of_transformers():
            encoder = load_encoder(self.folder / "corpus" / "encoder", str(self.device))
        if not self._has_own_encoder(variant):
            return encoder
        trained = TrainableEncoder(encoder)
        _load(trained, self._adapter_file(variant), "encoder.")
        return trained.to(self.device).eval().requires_grad_(False)

    def corpus_of(self, variant: VariantName) -> Corpus:
        """The corpus with the embeddings that a variant's planner reads; actions are those of the corpus."""
        if not self._has_own_encoder(variant):
            return self.corpus
        self.require(f"adapter/{variant}")
        return replace(self.corpus, embeddings=read_array(self.embeddings_file(variant)))

    def embeddings_file(self, variant: VariantName) -> Path:
        """The file of all sentences' embeddings by a variant's own encoder."""
        return self.folder / "adapters" / f"{variant}.embeddings.npy"

    def _has_own_encoder(self, variant: VariantName) -> bool:
        joint = variant in VARIANTS and VARIANTS[variant].joint
        return joint and self.config.training.joint.encoder_learning_rate > 0

    def save_adapter(self, variant: VariantName, model: PlannedLM) -> None:
        """Writes a variant's adapter, with the planner, temperature and encoder that were trained with it."""
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

    @property
    def _centroids(self) -> torch.Tensor:
        return torch.from_numpy(self.corpus.codebook.centroids)

    def _adapter_file(self, variant: str) -> Path:
        return self.folder / "adapters" / f"{variant}.safetensors"

    def _ensemble_file(self, member: str) -> Path:
        return self.folder / "depth" / f"{member}.safetensors"


def _stage_of(name: str) -> str | None:
    """The stage in which a model's LM may have been tuned."""
    if name in MEMBERS:
        return f"depth/{name}"
    return f"adapter/{name}" if name in VARIANTS else None


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
