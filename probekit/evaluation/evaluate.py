"""`probekit evaluate`: perplexity of every model on the same tokens, planners, and depth ensembles."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.config import ModelName
from probekit.data.windows import IGNORE, Batch
from probekit.evaluation.action_metrics import METRICS, score_actions
from probekit.evaluation.baselines import action_predictions
from probekit.evaluation.multiple_choice import (
    Question,
    TooShortError,
    by_document,
    check_lengths,
    choice_losses,
    corpus_questions,
    read_questions,
    solved,
)
from probekit.evaluation.perplexity import (
    Evaluation,
    TokenLosses,
    differences_table,
    evaluation_record,
    losses_table,
    own_losses,
    perplexity_table,
    scoring_pass,
    source_of_actions,
)
from probekit.models.depth_ensemble import MEMBERS, layer_losses
from probekit.models.mixing import VARIANTS, Fixed, Mixing, Oracle
from probekit.models.planned_lm import PlannedLM
from probekit.models.pretrained import dtype_name
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import bootstrap_ratio, bootstrap_ratios, paired_difference, sum_groups

Parts = dict[str, tuple[ModelName, int | None]]
"""Member and layer of each model that predicts, by the name under which it stands in the tables."""


def _evaluate_ensembles(run: Run, progress: Progress) -> Evaluation:
    """A depth ensemble beside the LM beneath it; without multiple choice if no question can be asked."""
    config, variant = run.config, run.config.depth.variant
    for member in config.depth.members:
        run.require(f"depth/{member}")
    scoring = replace(scoring_pass(run), corpus=run.corpus_of(variant))
    questions = _questions(run, progress)
    check_lengths(questions, evaluation_record(config)["window"])
    actions, mixing = source_of_actions(variant)

    parts: Parts = {}
    losses: dict[tuple[str, str], np.ndarray] = {}
    answered: dict[str, np.ndarray] = {}
    for name in (variant, *config.depth.members):
        own, token_losses = _readers(run, name, run.model(name))
        parts |= own
        with progress.task(f"evaluate {name}", total=len(scoring.windows)) as task:
            sums = scoring.document_losses(token_losses, mixing, task)
        losses |= {(reader, actions): row for reader, row in zip(own, sums, strict=True)}
        if questions:
            with progress.task(f"ask {name}", total=len(questions)) as task:
                right = solved(choice_losses(run, name, questions, token_losses, task), questions)
            answered |= dict(zip(own, right, strict=True))

    losses_by_group, tokens = scoring.by_group(losses)
    whole = {key: sums for key, sums in losses_by_group.items() if parts[key[0]][1] is None}
    evaluation = Evaluation(
        _with_parts(perplexity_table(config, losses_by_group, tokens), parts),
        differences_table(config, whole, tokens),
        losses_table(losses, scoring),
        evaluation_record(config),
    )
    if not questions:
        return evaluation
    accuracy, accuracy_differences = _accuracies(run, answered, parts, questions)
    choices = pd.DataFrame(
        {"question": number, "document": question.document, "variant": reader, "solved": bool(right)}
        for reader, rights in answered.items()
        for number, (question, right) in enumerate(zip(questions, rights, strict=True))
    ).assign(actions=actions)
    return replace(
        evaluation,
        settings=evaluation.settings | {"asked": _digest(questions)},
        accuracy=_with_parts(accuracy, parts),
        accuracy_differences=accuracy_differences,
        choices=_with_parts(choices, parts),
    )


def _readers(run: Run, name: ModelName, model: PlannedLM) -> tuple[Parts, TokenLosses]:
    """What a model predicts with, all of it and each of its layers, and their losses."""
    depth = model.depth
    if name not in MEMBERS or MEMBERS[name].reads != "late" or depth is None:
        return {name: (name, None)}, own_losses(model)
    head = model.backend.model.get_output_embeddings()

    def losses(batch: Batch, mixing: Mixing) -> Tensor:
        scored = batch.targets != IGNORE
        hidden = {hook: h[scored] for hook, h in model.late_hidden(batch, mixing).items()}
        found = layer_losses(head, depth(hidden), batch.targets[scored])
        placed = torch.zeros(len(found), *scored.shape, device=found.device)
        placed[:, scored] = found
        return placed

    return {name: (name, None)} | {f"{name}, layer {layer}": (name, layer) for layer in depth.layers}, losses


def _questions(run: Run, progress: Progress) -> list[Question]:
    """Those of `evaluation.questions_file`, else of the corpus; none where its documents are too short."""
    settings = run.config.evaluation
    if settings.questions_file is not None:
        return read_questions(settings.questions_file, run.corpus)
    window, seed = evaluation_record(run.config)["window"], run.config.corpus.seed
    try:
        return corpus_questions(run.corpus, run.corpus.documents("test"), settings.questions, window, seed)
    except TooShortError as error:
        progress.say(f"no multiple choice: {error}")
        return []


def _digest(questions: list[Question]) -> str:
    """A digest of the questions: runs of a sweep can be compared only if it is the same."""
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        for part in (question.context, *question.choices, np.array([question.answer])):
            digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()


def _accuracies(
    run: Run, answered: dict[str, np.ndarray], parts: Parts, questions: list[Question]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracies, and their differences between every two members."""
    options = run.config.resampling
    sums, counts = by_document(np.stack(list(answered.values())), questions)
    if run.config.evaluation.questions_file is None:  # else they are of the file's lines
        group = run.corpus.group[np.unique([question.document for question in questions])]
        sums, counts = sum_groups(group, sums), sum_groups(group, counts)
    found = bootstrap_ratios(sums, counts, **options)
    chance = float(np.mean([1 / len(question.choices) for question in questions]))
    accuracies = pd.DataFrame(
        {"variant": reader, "questions": len(questions), "chance": chance} | found[number].columns("accuracy")
        for number, reader in enumerate(answered)
    )
    whole = {reader: own for reader, own in zip(answered, sums.T, strict=True) if parts[reader][1] is None}
    differences = pd.DataFrame(
        {"first": first, "second": second}
        | paired_difference(whole[first], whole[second], counts, **options).columns("difference")
        for first, second in itertools.combinations(whole, 2)
    )
    return accuracies, differences


def _with_parts(table: pd.DataFrame, parts: Parts) -> pd.DataFrame:
    members, layers = zip(*(parts[name] for name in table.variant), strict=True)
    return table.assign(member=members, layer=pd.array(layers, dtype="Int64"))


def evaluate(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> Evaluation:
    """Evaluates a run on its test documents; writes `evaluation.json`, and `losses.parquet` by document.

    Args:
        run: The run or its folder.
        settings: Settings to replace for this evaluation, by dotted name, such as `evaluation.stride`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run lacks a stage, or a setting does not fit its LM.
    """
    run = Run.at(run, settings)
    run.check_writable()
    run.require_causal()
    progress = Progress(quiet=quiet)
    depth = run.config.method == "depth-ensemble"
    evaluation = _evaluate_ensembles(run, progress) if depth else _evaluate_planners(run, progress)
    evaluation = replace(evaluation, settings=evaluation.settings | {"dtype": dtype_name(run.dtype)})
    evaluation.write(run)
    return evaluation


def _evaluate_planners(run: Run, progress: Progress) -> Evaluation:
    if not run.finished("planner"):
        progress.say(
            f"no planner is trained in {run.folder}: the LM alone is evaluated "
            f"(`probekit train --resume --out {run.folder}` trains one)"
        )
    scoring = scoring_pass(run)
    losses: dict[tuple[str, str], np.ndarray] = {}
    for variant, actions, mixing in variants_and_actions(run):
        with progress.task(f"evaluate {variant} ({actions})", total=len(scoring.windows)) as task:
            read = replace(scoring, corpus=run.corpus_of(variant))
            model = run.model(variant)
            (losses[variant, actions],) = read.document_losses(own_losses(model), mixing, task)
    losses_by_group, tokens = scoring.by_group(losses)
    planner = None
    if run.finished("planner"):
        with progress.task("evaluate planners"):
            planner = _planner_table(run)
    return Evaluation(
        perplexity_table(run.config, losses_by_group, tokens),
        differences_table(run.config, losses_by_group, tokens),
        losses_table(losses, scoring),
        evaluation_record(run.config),
        planner=planner,
    )


def variants_and_actions(run: Run) -> list[tuple[Any, str, Mixing]]:
    """Every model with the source of its actions; oracle-trained variants are measured on both sources.

    Of a depth ensemble, these are the LM beneath it and its members.
    """
    if run.config.method == "depth-ensemble":
        beneath = run.config.depth.variant
        return [(name, *source_of_actions(beneath)) for name in (beneath, *run.members)]
    rows: list[tuple[Any, str, Mixing]] = [("none", "none", Fixed())]
    for variant in run.variants:
        rows.append((variant, *source_of_actions(variant)))
        if isinstance(VARIANTS[variant].training, Oracle):
            rows.append((variant, "true", Oracle()))
    return rows


def _planner_table(run: Run) -> pd.DataFrame:
    """Accuracy, top-5 and cross-entropy over all test sentences that have one before them, and an action."""
    corpus = run.corpus
    documents = corpus.documents("test")
    sentences = corpus.sentences(documents)
    later = sentences > corpus.document_sentences[corpus.document_of(sentences)]
    later &= corpus.with_action[sentences]
    groups = np.unique(corpus.group[documents])
    group = np.searchsorted(groups, corpus.group[corpus.document_of(sentences[later])])
    actions = corpus.actions[sentences[later]]
    counts = np.bincount(group, minlength=len(groups))
    rows = []
    for reader, log_probabilities in action_predictions(run, documents).items():
        scores = score_actions(log_probabilities[later], actions)
        for score, metric in METRICS.items():
            sums = np.bincount(group, weights=scores[score], minlength=len(groups))
            found = bootstrap_ratio(sums, counts, **run.config.resampling)
            rows.append({"reader": reader, "metric": metric, "sentences": len(actions)} | found.columns())
    return pd.DataFrame(rows)
