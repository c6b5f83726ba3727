"""How well the members of a depth ensemble, and each of their layers, predict tokens and next sentences."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from probekit.config import ModelName, VariantName
from probekit.data.windows import IGNORE, Batch
from probekit.evaluation.multiple_choice import (
    Question,
    TooShortError,
    accuracy,
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
    interval_columns,
    losses_table,
    own_losses,
    perplexity_table,
    record_of,
    scoring_pass,
)
from probekit.io import write_table
from probekit.models.depth_ensemble import MEMBERS, reader_losses
from probekit.models.mixing import VARIANTS, Mixing, evaluation_mixing
from probekit.models.planner_lm import PlannedLM
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import Resampling, paired_difference

CHOICES = "choices.parquet"
"""The file of who solves which question."""


@dataclass(frozen=True)
class EnsembleEvaluation(Evaluation):
    """What was found of a depth ensemble; the LM as it was before stands beside its members.

    In all tables `variant` is the name of what predicts: a member, or one of its layers by that layer's
    own norm, as `ensemble, layer 2`; columns `member` and `layer` (missing where all layers count) tell its
    parts.

    Attributes:
        accuracy: One row for each: the share of multiple-choice questions that it solves, and by chance.
        accuracy_differences: One row for each two members: difference of accuracies, paired over documents.
        choices: One row for each of them and question: whether it is solved.
    """

    accuracy: pd.DataFrame
    accuracy_differences: pd.DataFrame
    choices: pd.DataFrame


@dataclass(frozen=True)
class _Reader:
    """What predicts: a model, or one of its layers."""

    model: ModelName
    layer: int | None = None

    def __str__(self) -> str:
        return self.model if self.layer is None else f"{self.model}, layer {self.layer}"


def evaluate_ensembles(run: Run, progress: Progress) -> Evaluation:
    """Evaluates a run's depth ensemble on its test documents; writes what `evaluate` does, and choices.

    Args:
        run: The run.
        progress: Shows how far it is, and tells what is left out.

    Returns:
        An `EnsembleEvaluation`; without multiple choice, for which documents may be too short, not that.

    Raises:
        ProbekitError: A member is not trained, or the file of questions cannot be asked.
    """
    config, variant = run.config, run.config.depth.variant
    for member in config.depth.members:
        run.require(f"depth/{member}")
    scoring = replace(scoring_pass(run), corpus=run.corpus_of(variant))
    questions = _questions(run, progress)
    check_lengths(questions, record_of(config)["window"])
    actions, mixing = source_of_actions(variant)
    losses: dict[_Reader, np.ndarray] = {}
    chosen: dict[_Reader, np.ndarray] = {}
    for name in (variant, *config.depth.members):
        model = run.model(name, fast=True)
        readers, token_losses = _readers(run, name, model)
        with progress.task(f"evaluate {name}", total=len(scoring.windows)) as task:
            sums = scoring.document_losses(token_losses, mixing, task)
        losses |= dict(zip(readers, sums, strict=True))
        if questions:
            with progress.task(f"ask {name}", total=len(questions)) as task:
                right = solved(choice_losses(run, name, questions, token_losses, task), questions)
            chosen |= dict(zip(readers, right, strict=True))
    by_name = {(str(reader), actions): sums for reader, sums in losses.items()}
    whole = {key: sums for key, sums in by_name.items() if key[0] in (variant, *MEMBERS)}
    found = Evaluation(
        _with_parts(perplexity_table(config, by_name, scoring.tokens), _parts(losses)),
        differences_table(config, whole, scoring.tokens),
        losses_table(by_name, scoring),
        record_of(config),
    )
    if not questions:
        found.write(run)
        (run.folder / CHOICES).unlink(missing_ok=True)
        return found
    evaluation = _with_choices(run, found, chosen, questions)
    evaluation.write(run, accuracy=evaluation.accuracy, accuracy_differences=evaluation.accuracy_differences)
    write_table(run.folder / CHOICES, evaluation.choices)
    return evaluation


def _with_choices(
    run: Run, found: Evaluation, chosen: dict[_Reader, np.ndarray], questions: list[Question]
) -> EnsembleEvaluation:
    """An evaluation with multiple choice; `chosen` tells who solves which question `[questions]`."""
    accuracies, accuracy_differences = _accuracies(run, chosen, questions)
    choices = pd.DataFrame(
        [
            {"question": number, "document": question.document, "variant": str(reader), "solved": bool(right)}
            for reader, rights in chosen.items()
            for number, (question, right) in enumerate(zip(questions, rights, strict=True))
        ]
    ).assign(actions=source_of_actions(run.config.depth.variant)[0])
    parts = _parts(chosen)
    return EnsembleEvaluation(
        found.perplexity,
        found.differences,
        found.losses,
        found.settings | {"asked": _digest(questions)},
        _with_parts(accuracies, parts),
        accuracy_differences,
        _with_parts(choices, parts),
    )


def late_token_losses(model: PlannedLM, head: nn.Module) -> TokenLosses:
    """Losses of a depth ensemble, and behind it of each of its layers.

    Args:
        model: With its ensemble.
        head: The LM's head.
    """

    def losses(batch: Batch, mixing: Mixing) -> Tensor:
        assert model.depth is not None  # noqa: S101 - only ensembles come here
        scored = batch.targets != IGNORE
        hidden = {name: h[scored] for name, h in model.late_hidden(batch, mixing).items()}
        found = reader_losses(head, model.depth(hidden), batch.targets[scored])
        placed = torch.zeros(len(found), *scored.shape, device=found.device)
        placed[:, scored] = found
        return placed

    return losses


def _readers(run: Run, name: ModelName, model: PlannedLM) -> tuple[list[_Reader], TokenLosses]:
    """What a model predicts with, and the losses of each."""
    if name not in MEMBERS or MEMBERS[name].reads != "late" or model.depth is None:
        return [_Reader(name)], own_losses(model)
    head = run.base_lm(name).plain.get_output_embeddings()
    layers = [_Reader(name, layer) for layer in model.depth.layers]
    return [_Reader(name), *layers], late_token_losses(model, head)


def source_of_actions(variant: VariantName) -> tuple[str, Mixing]:
    """Where a variant's actions come from when it is evaluated, and how they are mixed."""
    mixing = evaluation_mixing(variant)
    if variant not in VARIANTS:
        return "none", mixing
    return "planner" if mixing.needs_scores else "constant", mixing


def _questions(run: Run, progress: Progress) -> list[Question]:
    """Those of the file of the settings, else of the corpus; none where its documents are too short."""
    settings = run.config.evaluation
    if settings.questions_file is not None:
        return read_questions(settings.questions_file, run.corpus)
    window, seed = record_of(run.config)["window"], run.config.corpus.seed
    try:
        return corpus_questions(run.corpus, run.corpus.documents("test"), settings.questions, window, seed)
    except TooShortError as error:
        progress.say(f"no multiple choice: {error}")
        return []


def _digest(questions: list[Question]) -> str:
    """What tells whether two runs were asked the same."""
    told = hashlib.blake2b(digest_size=16)
    for question in questions:
        for part in (question.context, *question.choices, np.array([question.answer])):
            told.update(np.ascontiguousarray(part, dtype=np.int64).tobytes() + b"|")
    return told.hexdigest()


def _accuracies(
    run: Run, chosen: dict[_Reader, np.ndarray], questions: list[Question]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    options: Resampling = {"resamples": run.config.evaluation.resamples, "seed": run.config.seed}
    right = np.stack(list(chosen.values()))
    chance = float(np.mean([1 / len(question.choices) for question in questions]))
    found = accuracy(right, questions, **options)
    table = [
        {"variant": str(reader), "questions": len(questions), "chance": chance}
        | interval_columns("accuracy", found[number])
        for number, reader in enumerate(chosen)
    ]
    by_reader, counts = by_document(right, questions)
    sums = dict(zip(chosen, by_reader.T, strict=True))
    differences = [
        {"first": str(first), "second": str(second)}
        | interval_columns("difference", paired_difference(sums[first], sums[second], counts, **options))
        for first, second in _pairs(sums)
    ]
    return pd.DataFrame(table), pd.DataFrame(differences)


def _pairs(readers: dict[_Reader, np.ndarray]) -> Iterator[tuple[_Reader, _Reader]]:
    return itertools.combinations([reader for reader in readers if reader.layer is None], 2)


def _parts(readers: Iterable[_Reader]) -> dict[str, tuple[ModelName, int | None]]:
    return {str(reader): (reader.model, reader.layer) for reader in readers}


def _with_parts(table: pd.DataFrame, parts: dict[str, tuple[ModelName, int | None]]) -> pd.DataFrame:
    layers = pd.array([parts[name][1] for name in table.variant], dtype="Int64")
    return table.assign(member=[parts[name][0] for name in table.variant], layer=layers)
