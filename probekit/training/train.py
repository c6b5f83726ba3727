"""`probekit train`: from settings to a run, stage by stage; finished stages are not done again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from probekit import hub, processes
from probekit.config import Config, MemberName, VariantName
from probekit.corpus.build import write_corpus
from probekit.corpus.store import too_few
from probekit.errors import ProbekitError
from probekit.models.base_lm import TUNINGS
from probekit.models.conditioning import location_width
from probekit.models.depth_ensemble import DepthEnsemble
from probekit.models.language_model import bridge, load_model, longest_window, new_model
from probekit.models.mixing import VARIANTS
from probekit.models.planned_lm import PlannedLM
from probekit.models.planner import Planner
from probekit.models.sentence_encoder import write_embeddings
from probekit.progress import Progress, without_bars_of_transformers
from probekit.provenance import lm_digest
from probekit.run import Run
from probekit.run_folder import Existing
from probekit.stage_settings import folds_of, stage_settings, stages_of, variants_of
from probekit.storage import atomic_folder, full_disks_told, write_json
from probekit.training.adapter import train_adapter
from probekit.training.checks import check_adapters, check_ensembles, check_new_model, check_positions
from probekit.training.depth_ensemble import train_ensemble
from probekit.training.language_model import train_language_model
from probekit.training.planner import train_planner
from probekit.training.saving import Saving, arithmetic_of
from probekit.training.state import StateFile
from probekit.training.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train(
    config: Config | None = None,
    out: str | Path = "runs/run",
    *,
    existing: Existing = "refuse",
    quiet: bool = False,
) -> Run:
    """Trains everything that the settings describe: corpus, LM (if new), planner and adapters.

    Args:
        config: The settings; None resumes a run with its own.
        out: The run's folder.
        existing: What to do where the folder exists: refuse, resume or overwrite.
        quiet: Show no progress.

    Raises:
        ProbekitError: The input is bad; what was written before stays whole.
    """
    progress = Progress(quiet=quiet)
    with _begun(config, out, existing, progress) as run:
        _train(run, progress)
    return run


def _train(run: Run, progress: Progress) -> None:
    _tell_what_begins_anew(run, progress)
    if run.config.lm.sharded:
        progress.say(run.sharding)
    if run.config.lm.name is not None:  # one that cannot be had is told before a long corpus is built
        _stage(run, "lm", partial(_language_model, run, progress))
    _stage(run, "corpus", partial(_corpus, run, progress))
    _stage(run, "lm", partial(_language_model, run, progress))
    stages, variants = stages_of(run.config), variants_of(run.config)
    if variants:
        check_adapters(run)
    if run.config.method == "depth-ensemble":
        check_ensembles(run)
    if "planner" in stages:
        _stage(run, "planner", partial(_planner, run, progress))
    for fold in range(folds_of(run.config)):
        _stage(run, f"planner/fold{fold}", partial(_planner, run, progress, fold))
    for variant in variants:
        _stage(run, f"adapter/{variant}", partial(_adapter, run, progress, variant))
    for member in run.config.depth.members:
        if (stage := f"depth/{member}") in stages:
            _stage(run, stage, partial(_ensemble, run, progress, member))


def build_corpus(
    config: Config | None = None,
    out: str | Path = "runs/run",
    *,
    existing: Existing = "refuse",
    quiet: bool = False,
) -> Run:
    """Begins a run and builds its corpus, the first stage of training; the arguments are `train`'s."""
    progress = Progress(quiet=quiet)
    with _begun(config, out, existing, progress) as run:
        _stage(run, "corpus", partial(_corpus, run, progress))
    return run


def prepare(
    config: Config,
    out: str | Path = "runs/run",
    *,
    existing: Existing = "refuse",
    quiet: bool = False,
) -> Run:
    """Begins a run with a pre-trained LM and a corpus, and trains nothing: what probing any model takes.

    Args:
        config: The settings; `lm.name` says which LM.
        out: The run's folder.
        existing: What to do where the folder exists: refuse, resume or overwrite.
        quiet: Show no progress.

    Raises:
        ProbekitError: No LM is named, or the input is bad.
    """
    if config.lm.name is None:
        raise ProbekitError("lm.name is not set; give the hub name or folder of the LM to probe (--model)")
    progress = Progress(quiet=quiet)
    with _begun(config, out, existing, progress) as run:
        _stage(run, "lm", partial(_language_model, run, progress))
        _stage(run, "corpus", partial(_corpus, run, progress))
    return run


@contextlib.contextmanager
def _begun(config: Config | None, out: str | Path, existing: Existing, progress: Progress) -> Iterator[Run]:
    """The run, begun or resumed by the first process and then opened by the others."""
    if config is not None and config.lm.name is None:
        check_new_model(config)
    if processes.is_first():
        with Run.begun(out, config, existing) as run:
            for stage, reason in run.unfinish_damaged().items():
                progress.say(f"{stage} is done again: {reason}")
            processes.wait()
            yield run
    else:
        processes.wait()
        yield Run.open(out)


def _stage(run: Run, name: str, work: Callable[[], dict[str, Any] | None]) -> None:
    finished, first = run.finished(name), processes.is_first()
    processes.wait()  # all have looked before anything is written
    if not finished:
        if first:
            run.begin_stage(name, _state(run, name).standing.step)
        processes.wait()
        begun = time.monotonic()
        facts = (work() or {}) | arithmetic_of(run, name)
        if first:
            run.mark_finished(name, {"seconds": round(time.monotonic() - begun, 1)} | facts)
    if first:
        _state(run, name).forget()
    processes.wait()


def _tell_what_begins_anew(run: Run, progress: Progress) -> None:
    """Names the stages that stood somewhere, under settings that are others now."""
    for stage in stages_of(run.config):
        if not run.finished(stage) and (difference := _state(run, stage).difference):
            progress.say(f"{stage} is begun anew: {difference}")


def _state(run: Run, stage: str) -> StateFile:
    path = run.checkpoints_of(stage) / "latest.safetensors"
    return StateFile(path, stage_settings(run.config, stage), 60 * run.config.training.save_minutes)


def _trainer(run: Run, progress: Progress, stage: str) -> Trainer:
    return Trainer(run.config, run.corpus, run.device, run.log, progress, _state(run, stage))


def _corpus(run: Run, progress: Progress) -> dict[str, Any]:
    if not processes.is_first():
        return {}
    corpus = write_corpus(run.config, run.folder / "corpus", progress, str(run.device))
    if warning := too_few(len(corpus.documents("test"))):
        progress.say(warning)
    return corpus.facts


def _language_model(run: Run, progress: Progress) -> dict[str, Any]:
    settings = run.config.lm
    if settings.name is None:
        untrained = new_model(settings, run.corpus.tokenizer, run.config.seed)
        # Refuses a location that is not there while little is lost.
        location_width(bridge(untrained, run.corpus.tokenizer, "a new GPT-2"), run.config.conditioning)
        saving = Saving(run, "lm", _save_language_model)
        model = train_language_model(_trainer(run, progress, "lm"), saving.checkpoint)
        saving.final(model)
    elif not processes.is_first():
        return {}
    else:
        source = hub.find(settings.name, setting="lm.name", revision=settings.revision)
        name = str(Path(source.name).resolve()) if source.revision is None else source.name
        with without_bars_of_transformers():
            model = load_model(name, revision=source.revision, trust_remote_code=settings.trust_remote_code)
        check_positions(run.config, longest_window(model))
        with atomic_folder(run.folder / "lm") as folder:
            write_json(folder / "source.json", {"name": name, "revision": source.revision})
    facts: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    if settings.name is not None and (weights := lm_digest(settings.name)):
        facts["weights"] = weights
    return facts


def _save_language_model(run: Run, model: PreTrainedModel, _: dict[str, Tensor]) -> None:
    with without_bars_of_transformers(), full_disks_told(), atomic_folder(run.folder / "lm") as folder:
        model.save_pretrained(folder)
        # safetensors lets only a file's owner read it; a run may be shared.
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
        run.corpus.tokenizer.save_pretrained(folder)


def _planner(run: Run, progress: Progress, fold: int | None = None) -> None:
    stage = "planner" if fold is None else f"planner/fold{fold}"

    def save(run: Run, planner: Planner, _: dict[str, Tensor]) -> None:
        run.save_planner(planner, fold)

    saving = Saving(run, stage, save)
    saving.final(train_planner(_trainer(run, progress, stage), fold, saving.checkpoint))


def _adapter(run: Run, progress: Progress, variant: VariantName) -> dict[str, Any]:
    settings, stage = run.config.training.base, f"adapter/{variant}"
    base = TUNINGS[settings.tuning](run.placed_model(), settings, run.config.seed)
    folds = range(folds_of(run.config) if VARIANTS[variant].out_of_fold else 0)
    fold_planners = [run.fold_planner(fold) for fold in folds]

    def save(run: Run, model: PlannedLM, tuned: dict[str, Tensor]) -> None:
        run.save_adapter(variant, model)
        if model.encoder is not None:
            write_embeddings(run.embeddings_file(variant), model.encoder, run.corpus, progress)
        base.save(run.tuned_folder(variant), tuned)

    saving = Saving(run, stage, save, base.weights)
    model = train_adapter(
        _trainer(run, progress, stage),
        variant,
        run.bridged,
        run.planner(),
        base,
        fold_planners,
        saving.checkpoint,
    )
    saving.final(model)
    assert model.adapter is not None  # noqa: S101 - only trained variants come here
    facts: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.adapter.parameters())}
    if base.parameters:
        facts["tuned_parameters"] = sum(parameter.numel() for parameter in base.parameters)
    if model.log_temperature is not None:
        facts["temperature"] = model.log_temperature.exp().item()
    return facts


def _ensemble(run: Run, progress: Progress, member: MemberName) -> dict[str, Any]:
    settings, variant, stage = run.config.training.base, run.config.depth.variant, f"depth/{member}"
    base = TUNINGS[settings.tuning](run.placed_model(variant), settings, run.config.seed)
    trainer = replace(_trainer(run, progress, stage), corpus=run.corpus_of(variant))
    out_of_fold = variant in VARIANTS and VARIANTS[variant].out_of_fold
    fold_planners = [run.fold_planner(fold) for fold in range(folds_of(run.config) if out_of_fold else 0)]

    def save(run: Run, ensemble: DepthEnsemble, tuned: dict[str, Tensor]) -> None:
        run.save_ensemble(member, ensemble)
        base.save(run.tuned_folder(member), tuned)

    saving = Saving(run, stage, save, base.weights)
    ensemble = train_ensemble(trainer, member, run.model(variant), base, fold_planners, saving.checkpoint)
    saving.final(ensemble)
    facts: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in ensemble.trained)}
    if base.parameters:
        facts["tuned_parameters"] = sum(parameter.numel() for parameter in base.parameters)
    return facts
