"""Sentences that the LM writes at a boundary, with and without an edit, and their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor

from probekit.causal.boundaries import AppliedEdit, Edit, EditedLM
from probekit.config import GenerationSettings
from probekit.data.corpus import Corpus
from probekit.data.encoders import WORD
from probekit.data.special_tokens import drawable_ids
from probekit.data.tokenizer import decoded
from probekit.errors import ProbekitError
from probekit.generation.generate import draw, without_others
from probekit.generation.metrics import Labeller
from probekit.models.decoding import GrowingText, new_decoder
from probekit.models.generation_state import GenerationState
from probekit.probing.targets import NO_LABEL

MAX_TOKENS = 24
"""A sentence that is not finished after so many tokens is cut."""

SAMPLING = GenerationSettings(temperature=1.0, top_k=None, top_p=None)
"""Tokens are drawn from the LM's own distribution."""


class Judge:
    """Labels sentences by their words: logistic regression on TF-IDF, fitted on training documents.

    It reads text alone, so it depends neither on the LM nor on the probes and directions that it judges.

    Args:
        corpus: The corpus.
        labels: Labels of all its sentences, `NO_LABEL` where there is none `[sentences]`.

    Raises:
        ProbekitError: The training documents have fewer than two labels.
    """

    def __init__(self, corpus: Corpus, labels: np.ndarray) -> None:
        texts, known = _labelled(corpus, labels, "train")
        if len(np.unique(known)) < 2:
            raise ProbekitError(
                "intervene.samples judges written sentences by a classifier fitted on the split 'train', "
                f"whose {len(known):,} labelled sentences have fewer than two labels; give more documents, "
                "or intervene.samples 0"
            )
        words = TfidfVectorizer(tokenizer=WORD.findall, token_pattern=None, sublinear_tf=True)
        self._pipeline = make_pipeline(words, LogisticRegression(max_iter=1000)).fit(texts, known)
        texts, known = _labelled(corpus, labels, "validation")
        accuracy = float((self(texts) == known).mean()) if len(known) else float("nan")
        majority = np.bincount(known).max() / len(known) if len(known) else float("nan")
        self.note = (
            f"written sentences are labelled by a classifier of words; on {len(known):,} validation "
            f"sentences its accuracy is {accuracy:.3f}, that of the most frequent label {majority:.3f}"
        )

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        """The label of each sentence, `NO_LABEL` for one without a word `[sentences]`."""
        if not sentences:
            return np.zeros(0, np.int64)
        found: np.ndarray = self._pipeline.predict(sentences)
        return np.where([bool(WORD.search(text)) for text in sentences], found, NO_LABEL)


def _labelled(corpus: Corpus, labels: np.ndarray, split: str) -> tuple[list[str], np.ndarray]:
    """The texts and labels of a split's sentences that have one."""
    sentences = corpus.sentences(corpus.documents(split))
    sentences = sentences[labels[sentences] != NO_LABEL]
    return corpus.sentence_texts(sentences), labels[sentences]


class SentenceWriter:
    """Writes the next sentence of some boundaries.

    The edit keeps its positions while the text grows. The draws of a boundary depend on the seed and its
    number alone, so that edits are compared on equal draws.

    Args:
        lm: The LM and its boundaries.
        count: How many of the boundaries to use, from the first.
        window: Tokens that the LM reads at once.
    """

    def __init__(self, lm: EditedLM, count: int, window: int) -> None:
        self._lm, self._run = lm, lm.run
        self.judge = None if lm.target.name == "action" else Judge(lm.corpus, lm.labels)
        self._labeller = Labeller(self._run) if self.judge is None else None
        self._rows = np.arange(min(count, len(lm.boundaries)))
        self.max_tokens = min(MAX_TOKENS, window - int(lm.boundaries.column[self._rows].max()))
        self.decoder = new_decoder(lm.model, lm.backend, window, lm.corpus.bos_rule)
        self._drawable = torch.from_numpy(drawable_ids(lm.run.corpus.tokenizer))

    def labels(self, edit: Edit | None = None) -> np.ndarray:
        """The label of the sentence written at each boundary `[boundaries]`, or `NO_LABEL` if it is blank.

        An action is that of the nearest centroid; other labels are what the judge says.
        """
        written = [text for rows in self._lm.batches(self._rows) for text in self.write(rows, edit)]
        if self.judge is not None:
            return self.judge([decoded(self._run.corpus.tokenizer, text.tolist()) for text in written])
        contexts = [self.context(row) for row in self._rows.tolist()]
        assert self._labeller is not None  # noqa: S101 - where there is no judge
        cut = self._labeller.cut(written, [self.max_tokens], contexts)[self.max_tokens]
        return np.array([own[0] if len(own) else NO_LABEL for own in cut.actions], np.int64)

    def context(self, row: int) -> np.ndarray:
        """The tokens of a boundary's window before it, without the separator."""
        corpus, boundaries = self._run.corpus, self._lm.boundaries
        start = boundaries.windows.start[row]
        end = start + boundaries.column[row] + 1
        begins_document = start == corpus.document_tokens[boundaries.windows.document[row]]
        first = start + (begins_document or corpus.bos_rule == "every-window")
        return np.asarray(corpus.tokens[first:end], dtype=np.int64)

    @torch.no_grad()
    def write(self, rows: np.ndarray, edit: Edit | None) -> list[np.ndarray]:
        """The tokens of the next sentence of some boundaries."""
        corpus, language = self._run.corpus, self._run.config.corpus.language
        contexts = [[corpus.separator, *self.context(row)] for row in rows.tolist()]
        states = [GenerationState(context, corpus.tokenizer, language) for context in contexts]
        seed, unfinished = self._run.config.seed, list(range(len(rows)))
        uniforms = np.stack([np.random.default_rng([seed, row]).random(self.max_tokens) for row in rows])
        texts, applied = self.growing_texts(rows, edit)
        for step in range(self.max_tokens):
            with self._lm.run.autocast():
                logits = self.decoder(texts, applied.hooks)
            tokens = self._draw(logits.float(), torch.from_numpy(uniforms[:, step]))
            for number in unfinished:
                states[number].text.tokens.append(int(tokens[number]))
                states[number].read()
            unfinished = [n for n in unfinished if len(states[n].sentences) <= states[n].first]
            if not unfinished:
                break
            for text, token in zip(texts, tokens.tolist(), strict=True):
                text.tokens.append(token)
                text.carried.append(text.carried[-1])
        return [np.array(state.written, dtype=np.int64) for state in states]

    def growing_texts(
        self, rows: np.ndarray, edit: Edit | None = None
    ) -> tuple[list[GrowingText], AppliedEdit]:
        """What the LM reads up to some boundaries, to be continued in the next sentence, and the edit."""
        lm, column = self._lm, self._lm.boundaries.column[rows]
        batch = lm.read(lm.boundaries.windows[rows])
        applied = AppliedEdit(edit, rows, torch.from_numpy(column).to(lm.device))
        embeddings = [*lm.model.embeddings(batch, applied.mixing(lm.mixing, batch))]
        unread = [lm.corpus.separator] * (lm.corpus.bos_rule == "none")
        texts = [
            GrowingText(
                [*unread, *batch.tokens[row, : end + 1].tolist()],
                [*[0] * len(unread), *batch.sentence[row, : end + 1].tolist()],
                embeddings,
            )
            for row, end in enumerate(column.tolist())
        ]
        return texts, applied

    def _draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """One token each; special tokens and unused rows of the embedding are never drawn."""
        allowed = without_others(logits, self._drawable.to(logits.device))
        return draw(allowed, uniforms.to(logits.device), SAMPLING)
