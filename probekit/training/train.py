"""`probekit train`: from settings to a run, stage by stage; finished stages are not repeated."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn import Parameter

from probekit import distributed
from probekit.config import Config, MemberName, ModelName, VariantName
from probekit.data import hub
from probekit.data.build import write_corpus
from probekit.data.corpus import too_few_tested
from probekit.data.encoders import check_encoder
from probekit.data.tokenizer import pretrained_tokenizer
from probekit.distributed import precision_of
from probekit.errors import ProbekitError
from probekit.io import atomic_folder, write_json
from probekit.models.conditioning import location_width, new_adapter
from probekit.models.depth_ensemble import new_ensemble
from probekit.models.frozen_lm import FrozenLM
from probekit.models.hook_points import architecture_of
from probekit.models.language_model import load_model, longest_window, new_model, save_model
from probekit.models.mixing import VARIANTS
from probekit.models.planned_lm import PlannedLM
from probekit.models.planner import Planner, write_embeddings
from probekit.models.pretrained import (
    check_memory,
    check_tokenizer,
    check_weights,
    dtype_name,
    dtype_of,
    load_config,
)
from probekit.models.revisions import name_of, published, same_tokenizer
from probekit.models.tuning import TUNINGS, Tuning
from probekit.progress import Progress
from probekit.run.folder import Existing, lm_digest
from probekit.run.run import Run
from probekit.run.stages import folds_of, stage_settings, stages_of, variants_of
from probekit.training.adapter import AdapterTraining
from probekit.training.depth_ensemble import DepthTraining
from probekit.training.language_model import train_language_model
from probekit.training.planner import train_planner
from probekit.training.trainer import StateFile, Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


T = TypeVar("T")


def check_new_model(config: Config) -> None:
    """Refuses what does not fit a new LM, whose size the settings say, before anything is written."""
    check_positions(config, config.lm.positions)
    if config.method == "depth-ensemble" and config.depth.layers > config.lm.layers:
        raise ProbekitError(
            f"depth.layers is {config.depth.layers}, but lm.layers is {config.lm.layers}; an ensemble has at "
            "most all layers of the LM"
        )
    tuned = config.training.base
    if tuned.tuning == "lora" and tuned.last_layers is not None and tuned.last_layers > config.lm.layers:
        raise ProbekitError(
            f"training.base.last_layers is {tuned.last_layers}, but lm.layers is {config.lm.layers}"
        )
    if config.conditioning.kind == "adapter" and config.conditioning.skip_layers >= config.lm.layers:
        raise ProbekitError(
            f"conditioning.skip_layers is {config.conditioning.skip_layers}, but lm.layers is "
            f"{config.lm.layers}: no layer is left to condition"
        )


def check_adapters(run: Run) -> None:
    """Refuses adapters that do not fit the LM, or lack an encoder, while the planner is not trained yet."""
    joint = any(VARIANTS[variant].joint for variant in variants_of(run.config))
    if joint and run.config.training.joint.encoder_learning_rate > 0:
        check_encoder(run.folder / "corpus" / "encoder")
    codebook = torch.from_numpy(run.corpus.codebook.centroids)
    lm = run.frozen_lm()
    adapter = new_adapter(run.config.conditioning, codebook, lm, run.config.seed)
    if run.config.training.base.tuning != "frozen":
        lm.check_tunable(adapter.names)


def check_ensembles(run: Run) -> None:
    """Refuses ensembles that do not fit the LM while nothing is trained on it yet."""
    base = run.frozen_lm()
    for member in run.config.depth.members:
        new_ensemble(member, run.config.depth, base, base.plain, run.config.seed)


def check_positions(config: Config, positions: int) -> None:
    """Refuses windows that are longer than an LM can read."""
    for setting, window in (
        ("training.window", config.training.window),
        ("evaluation.window", config.evaluation.window),
    ):
        if window is not None and window > positions:
            raise ProbekitError(f"{setting} is {window}, but the LM reads at most {positions} positions")


def train(
    config: Config | None = None,
    out: str | Path = "runs/run",
    *,
    existing: Existing = "refuse",
    quiet: bool = False,
) -> Run:
    """Trains all that the settings describe: LM (if new), planner, and adapters or depth ensembles.

    Args:
        config: The settings; None resumes a run with its own.
        out: The run's folder.
        existing: What to do where the folder exists: refuse, resume or overwrite.
        quiet: Show no progress.

    Raises:
        ProbekitError: The input is bad; what was written before stays whole.
    """
    progress = Progress(quiet=quiet)
    if isinstance(config, Config):
        _check_actions(config)  # before an earlier run is overwritten
    with _open_run(config, out, existing) as run:
        _check_actions(run.config)
        _train(run, progress)
    return run


def _check_actions(config: Config) -> None:
    if config.actions.labels == "none" and "planner" in stages_of(config):
        raise ProbekitError(
            "actions.labels is 'none', but planner and adapters are trained on actions; set "
            "actions.labels clusters, or only probe a pre-trained LM with `probekit probe --model`"
        )


def _train(run: Run, progress: Progress) -> None:
    stages = stages_of(run.config)
    for stage in stages:
        if not run.finished(stage) and (difference := _state(run, stage).difference):
            progress.say(f"{stage} begins again: {difference}")
    for stage in stages[:2]:  # the corpus and the LM, in their order
        _stage(run, stage, progress)
        if stage == "lm":
            run.require_causal()
    if variants_of(run.config):
        check_adapters(run)
    if run.config.method == "depth-ensemble":
        check_ensembles(run)
    for stage in stages[2:]:
        _stage(run, stage, progress)


def build_corpus(
    config: Config | None = None,
    out: str | Path = "runs/run",
    *,
    existing: Existing = "refuse",
    quiet: bool = False,
) -> Run:
    """Begins a run and builds its corpus, the first stage of training; the arguments are `train`'s."""
    progress = Progress(quiet=quiet)
    with _open_run(config, out, existing) as run:
        _stage(run, "corpus", progress)
    return run


def prepare(
    config: Config,
    out: str | Path = "runs/run",
    *,
    revisions: Sequence[str] = (),
    existing: Existing = "refuse",
    quiet: bool = False,
) -> Run:
    """Begins a run with a pre-trained LM and a corpus, and trains nothing: what probing any model takes.

    Args:
        config: The settings; `lm.name` says which LM.
        out: The run's folder.
        revisions: Published checkpoints of the LM that are kept beside it as checkpoints of the stage `lm`,
            as `revisions.published` takes them; those that are there already stay.
        existing: What to do where the folder exists: refuse, resume or overwrite.
        quiet: Show no progress.

    Raises:
        ProbekitError: No LM is named, or the input is bad.
    """
    if isinstance(config, Config) and config.lm.name is None:
        raise ProbekitError("lm.name is not set; give the hub name or folder of the LM to probe (--model)")
    progress = Progress(quiet=quiet)
    checkpoints = published(config, revisions)
    with _open_run(config, out, existing) as run:
        _stage(run, "lm", progress)
        _stage(run, "corpus", progress)
        if distributed.is_first():
            for step, own in checkpoints.items():
                _published(run, step, own, progress)
        distributed.wait()
    return run


def _published(run: Run, step: int, config: Config, progress: Progress) -> None:
    """Keeps a published checkpoint, on the same corpus if its tokenizer is the same."""
    if folder := run.checkpoints("lm").get(step):
        kept = Run.open(folder)
        if kept.config.lm != config.lm:
            raise ProbekitError(
                f"{folder} is {name_of(kept.config, step)!r}, not {name_of(config, step)!r}; give that, or "
                "choose another --out"
            )
        return
    facts: dict[str, Any] = {}
    with run.checkpoint("lm", step, facts, config) as checkpoint:
        facts |= _language_model(checkpoint, progress)
        if same_tokenizer(run.config, config):
            checkpoint.take_over("corpus", run)
        else:
            progress.say(f"the tokenizer of {name_of(config, step)} is another: its corpus is built anew")
            checkpoint.mark_finished("corpus", _corpus(checkpoint, progress))


@contextlib.contextmanager
def _open_run(config: Config | None, out: str | Path, existing: Existing) -> Iterator[Run]:
    """The run, begun or resumed by the first process and then opened by the others."""
    if not isinstance(config, Config | None):
        raise ProbekitError(f"config is {config!r}; give a Config, such as Config.from_preset('demo')")
    if config is not None and config.lm.name is None:
        check_new_model(config)
    if distributed.is_first():
        with Run.begin_locked(out, config, existing) as run:
            distributed.wait()
            yield run
    else:
        distributed.wait()
        yield Run.open(out)


def _stage(run: Run, name: str, progress: Progress) -> None:
    """Runs a stage, unless it is finished, and records it; all processes call it together."""
    kind, *which = name.split("/")
    finished, first = run.finished(name), distributed.is_first()
    distributed.wait()  # all have looked before anything is written
    if not finished:
        if first:
            run.begin_stage(name, _state(run, name).state().step)
        distributed.wait()
        start = time.monotonic()
        facts = (WORK[kind](run, progress, *which) or {}) | _precision_facts(run, name)
        if first:
            run.mark_finished(name, {"seconds": round(time.monotonic() - start, 1)} | facts)
    if first:
        _state(run, name).path.unlink(missing_ok=True)
    distributed.wait()


def _precision_facts(run: Run, stage: str) -> dict[str, str]:
    """What `auto` stood for in a stage: the arithmetic of its forward passes, the LM's dtype."""
    used = stage_settings(run.config, stage)
    facts: dict[str, str] = {}
    if "training.precision" in used:
        facts["precision"] = precision_of(run.device, run.config.training.precision)
    if "lm.dtype" in used:
        facts["dtype"] = dtype_name(run.dtype)
    return facts


def _state(run: Run, stage: str) -> StateFile:
    path = run.checkpoints_of(stage) / "latest.safetensors"
    return StateFile(path, stage_settings(run.config, stage), 60 * run.config.training.save_minutes)


def _checkpoints(run: Run, stage: str, save: Callable[[Run, T], None]) -> Callable[[T, int], None]:
    """Keeps a stage's model as it is after a step, as a run of its own; all processes call this together."""
    start = time.monotonic()

    def keep(model: T, step: int) -> None:
        if distributed.is_first():
            facts = {"seconds": round(time.monotonic() - start, 1)} | _precision_facts(run, stage)
            with run.checkpoint(stage, step, facts) as checkpoint:
                save(checkpoint, model)

    return keep


def _trainer(run: Run, progress: Progress, stage: str) -> Trainer:
    return Trainer(run.config, run.corpus, run.device, run.log, progress, _state(run, stage))


def _corpus(run: Run, progress: Progress) -> dict[str, Any]:
    if not distributed.is_first():
        return {}
    corpus = write_corpus(run.config, run.folder / "corpus", progress, str(run.device))
    if warning := too_few_tested(corpus):
        progress.say(warning)
    return corpus.facts


def _language_model(run: Run, progress: Progress) -> dict[str, Any]:
    settings = run.config.lm
    if settings.name is None:
        model = new_model(settings, run.corpus.tokenizer, run.config.seed)
        # Refuses a location that is not there while little is lost.
        lm = FrozenLM(lambda: model, model.config, run.corpus.tokenizer, "a new GPT-2")
        location_width(lm, run.config.conditioning)
        keep = _checkpoints(run, "lm", _save_language_model)
        train_language_model(_trainer(run, progress, "lm"), model.to(run.device), keep)
        if distributed.is_first():
            _save_language_model(run, model)
    elif not distributed.is_first():
        return {}
    else:
        source = hub.find(settings.name, setting="lm.name", revision=settings.revision)
        name = str(source.path.resolve()) if source.revision is None else source.name
        where: dict[str, Any] = {"revision": source.revision, "trust_remote_code": settings.trust_remote_code}
        config = load_config(name, **where)
        check_positions(run.config, longest_window(config))
        tokenizer = pretrained_tokenizer(settings)
        check_tokenizer(tokenizer, config, name)
        dtype = dtype_of(settings.dtype, config, run.device)
        if settings.device_map is None:
            check_memory(name, config, dtype)  # before layers are made, which is slow for a very large LM
        # Refuses what is neither a causal nor a bidirectional LM, or cannot be bridged.
        if note := architecture_of(config, tokenizer, name).note:
            progress.say(note)
        model = load_model(name, **where, device_map=settings.device_map, dtype=dtype)
        check_weights(model, settings.name)
        with atomic_folder(run.folder / "lm") as folder:
            write_json(folder / "source.json", {"name": name, "revision": source.revision})
    facts: dict[str, Any] = {"parameters": _count(model.parameters())}
    if settings.name is not None and (weights := lm_digest(settings.name)):
        facts["weights"] = weights
    return facts


def _save_language_model(run: Run, model: PreTrainedModel) -> None:
    with atomic_folder(run.folder / "lm") as folder:
        save_model(model, folder)
        run.corpus.tokenizer.save_pretrained(folder)


def _planner(run: Run, progress: Progress, part: str | None = None) -> None:
    stage = "planner" if part is None else f"planner/{part}"
    fold = None if part is None else int(part.removeprefix("fold"))
    planner = train_planner(_trainer(run, progress, stage), fold)
    if distributed.is_first():
        run.save_planner(planner, fold)


def _tuning(run: Run, name: ModelName) -> Tuning | None:
    """A fresh copy of a model's LM with what is to be trained of it, float32; None: nothing."""
    settings = run.config.training.base
    if settings.tuning == "frozen":
        return None
    dtype = torch.float32 if settings.tuning == "full" else run.dtype
    return TUNINGS[settings.tuning](run.placed_model(name, dtype), settings, run.config.seed)


def _save_tuned(run: Run, name: ModelName, tuning: Tuning) -> None:
    """Writes a tuned LM with its tokenizer, so that its folder can be given wherever an LM can."""
    tuning.save(run.tuned_folder(name))
    run.corpus.tokenizer.save_pretrained(run.tuned_folder(name))


def _adapter(run: Run, progress: Progress, variant: VariantName) -> dict[str, Any]:
    stage, tuning = f"adapter/{variant}", _tuning(run, "none")

    def save(run: Run, model: PlannedLM) -> None:
        run.save_adapter(variant, model)
        if model.encoder is not None:
            write_embeddings(run.embeddings_file(variant), model.encoder, run.corpus, progress)
        if tuning is not None:
            _save_tuned(run, variant, tuning)

    keep = _checkpoints(run, stage, save)
    trainer, fold_planners = _trainer(run, progress, stage), _fold_planners(run, variant)
    training = AdapterTraining(trainer, variant, run.frozen_lm(), run.planner(), tuning, fold_planners)
    model = training.run(keep)
    if distributed.is_first():
        save(run, model)
    assert model.adapter is not None  # noqa: S101 - only trained variants come here
    facts: dict[str, Any] = {"parameters": _count(model.adapter.parameters())} | _tuned_count(tuning)
    if model.log_temperature is not None:
        facts["temperature"] = model.log_temperature.exp().item()
    return facts


def _ensemble(run: Run, progress: Progress, member: MemberName) -> dict[str, Any]:
    variant, stage = run.config.depth.variant, f"depth/{member}"
    tuning = _tuning(run, variant)
    trainer = replace(_trainer(run, progress, stage), corpus=run.corpus_of(variant))
    conditioned = run.model(variant, plain=None if tuning is None else tuning.model)
    lm, fold_planners = run.frozen_lm(variant), _fold_planners(run, variant)
    training = DepthTraining(trainer, member, lm, conditioned, tuning, fold_planners)
    ensemble = training.run()
    if distributed.is_first():
        run.save_ensemble(member, ensemble)
        if tuning is not None:
            _save_tuned(run, member, tuning)
    return {"parameters": _count(ensemble.trained)} | _tuned_count(tuning)


def _fold_planners(run: Run, variant: ModelName) -> list[Planner]:
    """The planners of the folds, of a variant that is trained on their scores; else none."""
    out_of_fold = variant in VARIANTS and VARIANTS[variant].out_of_fold
    return [run.fold_planner(fold) for fold in range(folds_of(run.config) if out_of_fold else 0)]


def _count(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _tuned_count(tuning: Tuning | None) -> dict[str, int]:
    return {} if tuning is None else {"tuned_parameters": _count(tuning.parameters)}


WORK: dict[str, Callable[..., dict[str, Any] | None]] = {
    "corpus": _corpus,
    "lm": _language_model,
    "planner": _planner,
    "adapter": _adapter,
    "depth": _ensemble,
}
"""What a stage does, by the first part of its name; called with run, progress and the rest of the name."""
