"""The planner's stage: the cross-entropy of every sentence's action, or of soft targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name all of PyTorch's users know

from probekit import processes
from probekit.config import PlannerStageSettings
from probekit.corpus.examples import IGNORE, chunks, document_batch
from probekit.errors import ProbekitError
from probekit.models.planner import Planner
from probekit.training.folds import fold_of_documents
from probekit.training.stage import Group, Stage
from probekit.training.trainer import Trainer


class PlannerLoss:
    """Cross-entropy between what the planner says and what it is to say, summed over sentences.

    Args:
        settings: Hard targets, the sentences' actions, or soft ones, a softmax over the negative squared
            distances of a sentence's embedding to all centroids.
        codebook: The centroids `[actions, dimensions]`.
    """

    def __init__(self, settings: PlannerStageSettings, codebook: Tensor) -> None:
        self._settings, self._codebook = settings, codebook

    def __call__(self, scores: Tensor, actions: Tensor, embeddings: Tensor) -> Tensor:
        """The sum of the losses of some sentences.

        Args:
            scores: Planner logits `[sentences, actions]`.
            actions: Actions, `IGNORE` for a row that does not count `[sentences]`.
            embeddings: Embeddings of the same sentences, by the encoder that the actions come from
                `[sentences, dimensions]`.
        """
        if self._settings.targets == "hard":
            return F.cross_entropy(scores.float(), actions, ignore_index=IGNORE, reduction="sum")
        counted = actions != IGNORE
        targets = self.soft_targets(embeddings[counted])
        return F.cross_entropy(scores[counted].float(), targets, reduction="sum")

    def soft_targets(self, embeddings: Tensor) -> Tensor:
        """What the planner is to say of sentences with these embeddings `[sentences, actions]`."""
        # Without the embedding's own square, which is the same for every centroid.
        distances = self._codebook.square().sum(dim=-1) - 2.0 * embeddings.float() @ self._codebook.T
        nearest = distances.amin(dim=-1, keepdim=True)  # keeps the exponents of a low temperature finite
        return F.softmax((nearest - distances) / self._settings.target_temperature, dim=-1)


def train_planner(
    trainer: Trainer, fold: int | None = None, keep: Callable[[Planner, int], None] | None = None
) -> Planner:
    """Trains the planner on the cross-entropy of every sentence's action.

    Documents of one sentence are left out: they have no next sentence to plan.

    Args:
        trainer: What every stage needs.
        fold: Train on the documents outside this one of `training.planner.folds` folds; None: on all.
        keep: Keeps the planner as it is behind a step.

    Raises:
        ProbekitError: A split, or what is outside the fold, has no other documents.
    """
    config, corpus = trainer.config, trainer.corpus
    settings, codebook = config.training.planner, torch.from_numpy(corpus.codebook.centroids)
    planner = Planner(config.planner, codebook, config.seed).to(trainer.device)
    planner_loss = PlannerLoss(settings, codebook.to(trainer.device))
    train, validation = _documents(trainer, "train", fold), _documents(trainer, "validation")
    lengths = np.diff(corpus.document_sentences)

    def loss(documents: np.ndarray) -> Tensor:
        embeddings, actions = (tensor.to(trainer.device) for tensor in document_batch(corpus, documents))
        with trainer.autocast():
            scores = planner(embeddings)
        return planner_loss(scores.flatten(0, 1), actions.flatten(), embeddings.flatten(0, 1))

    def validation_loss() -> float:
        planner.eval()
        with torch.no_grad():
            own = processes.share(chunks(len(validation), settings.batch_size))
            total = sum(loss(validation[rows]).item() for rows in own)
        planner.train()
        return processes.total(total, trainer.device) / int(lengths[validation].sum())

    planner.train()
    trainer.optimise(
        Stage(
            "planner" if fold is None else f"planner/fold{fold}",
            settings,
            [Group(list(planner.parameters()), settings.learning_rate)],
            len(train),
            lambda rows, step: loss(train[rows]) / int(lengths[train[step]].sum()),
            validation_loss,
            keep=keep and partial(keep, planner),
            documents=train,
        )
    )
    return planner.eval()


def _documents(trainer: Trainer, split: str, fold: int | None = None) -> np.ndarray:
    """Documents of a split, outside a fold if one is given, that have a next sentence to plan."""
    config, corpus = trainer.config, trainer.corpus
    documents, which = corpus.documents(split), f"the split {split!r}"
    if fold is not None:
        of_document = fold_of_documents(corpus, config.training.planner.folds, config.seed)
        documents, which = documents[of_document[documents] != fold], f"{which} outside fold {fold}"
    longer = documents[np.diff(corpus.document_sentences)[documents] > 1]
    if not len(longer):
        raise ProbekitError(
            f"all documents of {which} have one sentence: there is no next one to plan; give longer documents"
        )
    return longer
