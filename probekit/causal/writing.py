"""Sentences that the LM writes at a boundary, with and without an edit, and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor

from probekit.causal.boundaries import Edit, EditedLM
from probekit.config import GenerationSettings
from probekit.data.corpus import Corpus
from probekit.data.encoders import WORD
from probekit.data.tokenizer import drawable_ids
from probekit.data.windows import IGNORE, Batch, Windows
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import NO_ACTION
from probekit.generation.generate import draw, without_others
from probekit.generation.metrics import Labeller
from probekit.models.replanning import GenerationState, decoded
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
        """The label of each sentence, `NO_ACTION` for one without a word `[sentences]`."""
        if not sentences:
            return np.zeros(0, np.int64)
        found: np.ndarray = self._pipeline.predict(sentences)
        return np.where([bool(WORD.search(text)) for text in sentences], found, NO_ACTION)


def _labelled(corpus: Corpus, labels: np.ndarray, split: str) -> tuple[list[str], np.ndarray]:
    """The texts and labels of a split's sentences that have one."""
    sentences = corpus.sentences(corpus.documents(split))
    sentences = sentences[labels[sentences] != NO_LABEL]
    return corpus.sentence_texts(sentences), labels[sentences]


class SentenceWriter:
    """Writes the next sentence of some boundaries.

    The edit keeps its positions while the text grows, and every token reads the whole window again. The draws
    of a boundary depend on the seed and its number alone, so that edits are compared on equal draws.

    Args:
        lm: The LM and its boundaries.
        count: How many of the boundaries to use, from the first.
        window: Tokens that the LM reads at once.
    """

    def __init__(self, lm: EditedLM, count: int, window: int) -> None:
        self._lm, self._run = lm, lm.run
        self.judge = None if lm.target.name == "action" else Judge(lm.corpus, lm.labels)
        self._rows = np.arange(min(count, len(lm.boundaries)))
        self.max_tokens = min(MAX_TOKENS, window - int(lm.boundaries.column[self._rows].max()))
        self._drawable = torch.from_numpy(drawable_ids(lm.run.corpus.tokenizer))

    def labels(self, edit: Edit | None = None) -> np.ndarray:
        """The label of the sentence written at each boundary `[boundaries]`, or `NO_ACTION` if it is blank.

        An action is that of the nearest centroid; other labels are what the judge says.
        """
        written = [text for rows in self._lm.batches(self._rows) for text in self.write(rows, edit)]
        if self.judge is not None:
            return self.judge([decoded(self._run.corpus.tokenizer, text.tolist()) for text in written])
        contexts = [self.context(row) for row in self._rows.tolist()]
        cut = Labeller(self._run).cut(written, [self.max_tokens], contexts)[self.max_tokens]
        return np.array([own[0] if len(own) else NO_ACTION for own in cut.actions], np.int64)

    def context(self, row: int) -> np.ndarray:
        """The tokens of a boundary's window before it, without the separator."""
        corpus, boundaries = self._run.corpus, self._lm.boundaries
        start = boundaries.windows.start[row]
        end = start + boundaries.column[row] + 1
        begins_document = start == corpus.document_tokens[boundaries.windows.document[row]]
        first = start + (begins_document or corpus.bos_rule == "every-window")
        return np.asarray(corpus.tokens[first:end], dtype=np.int64)

    def write(self, rows: np.ndarray, edit: Edit | None) -> list[np.ndarray]:
        """The tokens of the next sentence of some boundaries."""
        corpus, column = self._run.corpus, torch.from_numpy(self._lm.boundaries.column[rows])
        states = [
            GenerationState(
                [corpus.separator, *self.context(row)], corpus.tokenizer, self._run.config.corpus.language
            )
            for row in rows.tolist()
        ]
        seed, unfinished = self._run.config.seed, list(range(len(rows)))
        uniforms = np.stack([np.random.default_rng([seed, row]).random(self.max_tokens) for row in rows])
        batch = self.growing_batch(rows)
        for step in range(self.max_tokens):
            # A view: tokens that are written into the batch are read in the next step.
            length = int(column.max()) + step + 1
            parts = {name: getattr(batch, name)[:, :length] for name in ("tokens", "sentence", "targets")}
            logits, *_ = self._lm.predict(replace(batch, **parts), rows, edit)
            last = logits[torch.arange(len(rows)), column + step].float()
            tokens = self._draw(last, torch.from_numpy(uniforms[:, step]))
            for number in unfinished:
                states[number].text.tokens.append(int(tokens[number]))
                states[number].read()
            unfinished = [n for n in unfinished if len(states[n].sentences) <= states[n].first]
            if not unfinished or step + 1 == self.max_tokens:
                break
            batch.tokens[torch.arange(len(rows)), column + step + 1] = tokens
        return [np.array(state.written, dtype=np.int64) for state in states]

    def growing_batch(self, rows: np.ndarray) -> Batch:
        """The windows up to the boundary, padded for the tokens to be written, all of the next sentence."""
        boundaries, device = self._lm.boundaries, self._lm.device
        column, windows = boundaries.column[rows], boundaries.windows[rows]
        batch = self._lm.read(Windows(windows.document, windows.start, column + 1, column + 1))
        padding = (0, int(column.max()) + self.max_tokens - batch.tokens.shape[1])
        tokens, sentence = (torch.nn.functional.pad(t, padding) for t in (batch.tokens, batch.sentence))
        at = torch.from_numpy(column).to(device)[:, None]
        behind = torch.arange(tokens.shape[1], device=device) > at
        sentence = torch.where(behind, batch.sentence.gather(1, at), sentence)
        return replace(batch, tokens=tokens, sentence=sentence, targets=torch.full_like(tokens, IGNORE))

    def _draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """One token each; special tokens and unused rows of the embedding are never drawn."""
        allowed = without_others(logits, self._drawable.to(logits.device))
        return draw(allowed, uniforms.to(logits.device), SAMPLING)
