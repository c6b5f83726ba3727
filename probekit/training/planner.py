"""The planner's stage: the cross-entropy of every sentence's action, or of soft targets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from probekit import distributed
from probekit.config import PlannerStageSettings
from probekit.data.corpus import Corpus
from probekit.data.windows import IGNORE, Batch, chunks, document_batch
from probekit.errors import ProbekitError
from probekit.models.planner import Planner
from probekit.training.trainer import Group, Stage, Trainer


def fold_of_documents(corpus: Corpus, folds: int, seed: int) -> np.ndarray:
    """The fold of every document, -1 for those that are not for training `[documents]`.

    Documents with the same tokens, or of one group, are in the same fold.

    Raises:
        ProbekitError: There are fewer distinct training documents than folds.
    """
    train = corpus.documents("train")
    bounds = zip(corpus.document_tokens[train], corpus.document_tokens[train + 1], strict=True)
    digests = [_digest(corpus.tokens[start:stop]) for start, stop in bounds]
    _, number = np.unique(np.array(digests, dtype="S16"), return_inverse=True)
    of_group = np.full(len(corpus.split), len(train))
    np.minimum.at(of_group, corpus.group[train], number)
    distinct, number = np.unique(of_group[corpus.group[train]], return_inverse=True)
    if folds > len(distinct):
        raise ProbekitError(
            f"training.planner.folds is {folds}, but there are {len(distinct)} distinct training documents "
            f"(those of one group count once); "
            f"set it to {len(distinct)} or less"
        )
    found = np.full(len(corpus.split), -1)
    found[train] = (np.random.default_rng(seed).permutation(len(distinct)) % folds)[number]
    return found


class OutOfFold:
    """Scores every training document by the planner of its fold.

    Args:
        planners: For every fold, a planner trained on the documents outside it.
        corpus: The documents.
        seed: That of the training, which the folds are drawn by.
    """

    def __init__(self, planners: Sequence[Planner], corpus: Corpus, seed: int) -> None:
        self._planners, self._fold = planners, fold_of_documents(corpus, len(planners), seed)

    def scores(self, batch: Batch) -> Tensor:
        """Scores of the touched sentences `[touched, actions]`, each document's from one planner alone."""
        fold = self._fold[batch.documents]
        parts, order = [], []
        with torch.no_grad():
            for number in np.unique(fold):
                rows = np.flatnonzero(fold == number)
                parts.append(self._planners[number](batch.context[torch.from_numpy(rows)]))
                order.append(rows)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return torch.cat(parts)[back].flatten(0, 1)[batch.touched]


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


class PlannerLoss:
    """Cross-entropy between the planner's predictions and their targets, summed over sentences.

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
        if self._settings.target_temperature == 0:
            return F.cross_entropy(scores.float(), actions, ignore_index=IGNORE, reduction="sum")
        counted = actions != IGNORE
        targets = self.soft_targets(embeddings[counted])
        return F.cross_entropy(scores[counted].float(), targets, reduction="sum")

    def soft_targets(self, embeddings: Tensor) -> Tensor:
        """The target distribution for sentences with these embeddings `[sentences, actions]`."""
        # Without the embedding's own square, which is the same for every centroid.
        distances = self._codebook.square().sum(dim=-1) - 2.0 * embeddings.float() @ self._codebook.T
        nearest = distances.amin(dim=-1, keepdim=True)  # keeps the exponents of a low temperature finite
        return F.softmax((nearest - distances) / self._settings.target_temperature, dim=-1)


def train_planner(trainer: Trainer, fold: int | None = None) -> Planner:
    """Trains the planner on the cross-entropy of every sentence's action.

    Sentences that have none do not count. Documents without an action behind their first sentence are left
    out: they have no next one to plan.

    Args:
        trainer: What every stage needs.
        fold: Train on the documents outside this one of `training.planner.folds` folds; None: on all.

    Raises:
        ProbekitError: A split, or what is outside the fold, has no other documents.
    """
    config, corpus = trainer.config, trainer.corpus
    settings, codebook = config.training.planner, torch.from_numpy(corpus.codebook.centroids)
    planner = Planner(config.planner, codebook, config.seed).to(trainer.device)
    planner_loss = PlannerLoss(settings, codebook.to(trainer.device))
    train, validation = _documents(trainer, "train", fold), _documents(trainer, "validation")
    counted = _actions_by_document(corpus)

    def loss(documents: np.ndarray) -> Tensor:
        embeddings, actions = (tensor.to(trainer.device) for tensor in document_batch(corpus, documents))
        with trainer.autocast():
            scores = planner(embeddings)
        return planner_loss(scores.flatten(0, 1), actions.flatten(), embeddings.flatten(0, 1))

    def validation_loss() -> float:
        planner.eval()
        with torch.no_grad():
            own = distributed.share(chunks(len(validation), settings.batch_size))
            total = sum(loss(validation[rows]).item() for rows in own)
        planner.train()
        return distributed.total(total, trainer.device) / int(counted[validation].sum())

    planner.train()
    trainer.optimise(
        Stage(
            "planner" if fold is None else f"planner/fold{fold}",
            settings,
            [Group(list(planner.parameters()), settings.learning_rate)],
            len(train),
            lambda rows, step: loss(train[rows]) / int(counted[train[step]].sum()),
            validation_loss,
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
    first = corpus.document_sentences[documents]
    longer = documents[_actions_by_document(corpus)[documents] > corpus.with_action[first]]
    if not len(longer):
        raise ProbekitError(
            f"all documents of {which} have one sentence (or no action in later ones): there is no next one "
            "to plan; give longer documents"
        )
    return longer


def _actions_by_document(corpus: Corpus) -> np.ndarray:
    """How many sentences of each document have an action to predict `[documents]`."""
    return np.diff(np.append(0, np.cumsum(corpus.with_action))[corpus.document_sentences])
