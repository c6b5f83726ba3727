"""Trainings of the tiny run's stages with a few settings changed, and their losses computed another way."""

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from probekit.data.corpus import Corpus
from probekit.io import read_tensors, write_tensors
from probekit.models.frozen_lm import FrozenLM
from probekit.models.planner import Planner
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.run.stages import stages_of
from probekit.training.train import train
from probekit.training.trainer import Trainer

QUIET = Progress(quiet=True)
ALL = 10_000
"""A batch size that holds every example: one step an epoch, whose loss is that of all training data."""


def trainer(run: Run, corpus: Corpus | None = None, **settings: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    """A trainer on the tiny run's corpus (or another) and the rows that it will log."""
    rows: list[dict[str, Any]] = []
    config = run.config.override({name.replace("__", "."): value for name, value in settings.items()})
    return Trainer(config, corpus or run.corpus, torch.device("cpu"), rows.append, QUIET), rows


def run_maker(run: Run, folder: Path, fixed: Mapping[str, Any]) -> Callable[..., Run]:
    """Trains what a run's settings ask for after LM and planner, which it has from another run.

    Args:
        run: The other one.
        folder: Where the runs are made; equal settings share one.
        fixed: Settings by dotted name, for all of them.
    """
    made: dict[str, Run] = {}
    numbers = itertools.count()

    def make(**settings: Any) -> Run:
        name = str(settings)
        if name not in made:
            given = {key.replace("__", "."): value for key, value in settings.items()}
            config = run.config.override({**fixed, **given})
            new = Run.begin(folder / str(next(numbers)), config)
            for stage in ("corpus", "lm", "planner"):
                if stage in stages_of(config):
                    new.take_over(stage, run)
            made[name] = train(config, new.folder, existing="resume", quiet=True)
        return made[name]

    return make


def with_strong_adapters(run: Run, folder: Path, factor: float) -> Run:
    """A copy of a run with adapters that matter as much as trained ones do."""
    copy = Run.open(shutil.copytree(run.folder, folder / "run"))
    for path in (copy.folder / "adapters").glob("*.safetensors"):
        tensors = read_tensors(path)
        tensors["adapter.projections"] *= factor
        write_tensors(path, tensors)
    return copy


def one_step(stage: str, **settings: Any) -> dict[str, Any]:
    """Settings for one step over all training data."""
    fixed = {"epochs": 1, "batch_size": ALL, "learning_rate": 1e-6}
    return {f"training__{stage}__{name}": value for name, value in fixed.items()} | settings


def first_loss(rows: list[dict[str, Any]]) -> float:
    return next(row["loss"] for row in rows if "loss" in row)


def base_lm(run: Run) -> FrozenLM:
    """The run's LM, of a test's own."""
    return FrozenLM(run.plain_model, run.frozen_lm().config, run.corpus.tokenizer, "lm")


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def mean_token_loss(run: Run, model: torch.nn.Module, split: str) -> float:
    """Mean loss of a split's tokens, window by window; a document's last one may be shorter."""
    corpus, window = run.corpus, run.config.training.window
    total, count = 0.0, 0
    for document in corpus.documents(split):
        start, stop = corpus.document_tokens[document], corpus.document_tokens[document + 1]
        for first in range(start, stop - 1, window):
            last = min(first + window, stop - 1)
            read = torch.from_numpy(corpus.tokens[first : last + 1].astype(np.int64))
            with torch.no_grad():
                logits = model(read[None, :-1]).logits[0]
            total += cross_entropy(logits, read[1:], reduction="sum").item()
            count += last - first
    assert count == sum(np.diff(corpus.document_tokens)[corpus.documents(split)] - 1)
    return total / count


def mean_action_loss(corpus: Corpus, planner: Planner, documents: np.ndarray) -> float:
    """Mean loss of the documents' actions, document by document, first sentences too."""
    total, count = 0.0, 0
    for document in documents:
        rows = slice(corpus.document_sentences[document], corpus.document_sentences[document + 1])
        with torch.no_grad():
            scores = planner(torch.from_numpy(np.array(corpus.embeddings[rows]))[None])[0]
        actions = torch.from_numpy(corpus.actions[rows].astype(np.int64))
        total += cross_entropy(scores, actions, reduction="sum").item()
        count += len(actions)
    return total / count
