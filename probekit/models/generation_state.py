"""Texts that are being generated: their sentences so far, and the action that each position carries.

Where a sentence ends, `data/sentences.py` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from probekit.config import VariantName
from probekit.data.codebook import Codebook
from probekit.data.encoders import SentenceEncoder
from probekit.data.sentences import align, complete_spans, sentence_spans
from probekit.data.tokenizer import decoded
from probekit.distributed import autocast
from probekit.errors import ProbekitError
from probekit.models.conditioning import Adapter
from probekit.models.decoding import GrowingText
from probekit.models.mixing import VARIANTS, Mixing, Oracle
from probekit.models.planned_lm import PlannedLM
from probekit.models.planner import Planner, TrainableEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NEAR = 64
"""Tokens that are decoded to find what the next one adds to the text."""


def _ends(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[int]:
    """How many characters the tokens up to each one stand for.

    Only the last ones are decoded again for each: how many characters come with a token is decided by what is
    near, such as the other bytes of its character. So the time does not grow with the square of the length.
    """
    ends = [0]
    for i in range(0, len(tokens), _NEAR):
        near = tokens[max(0, i - _NEAR) : i + _NEAR]
        before = min(i, _NEAR)
        known = ends[i] - len(decoded(tokenizer, near[:before]))
        ends += [known + len(decoded(tokenizer, near[: n + 1])) for n in range(before, len(near))]
    return ends[1:]


class GenerationState:
    """A text that is being generated, and its sentences.

    Args:
        prompt: Ids, the separator first.
        tokenizer: Decodes tokens.
        language: Of the sentence splitter.
        given: The plan that is given for the sentences after the prompt, if one is.

    Attributes:
        text: What the LM reads.
        prompt: The prompt as text.
        sentences: The sentences that are complete, surrounding white space removed.
        embeddings: Their embeddings, as far as they are known.
        actions: The action of every sentence from the first to the one that the next token is in, as far as
            they are known.
        first: The sentence that the token after the prompt is in.
        given: The plan that is given for the sentences after the prompt, empty where none is.
        ended: Why nothing more is to be generated; None as long as something is.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        language: str,
        given: np.ndarray | None = None,
    ) -> None:
        self.text = GrowingText(list(prompt), [], [])
        self.prompt = decoded(tokenizer, prompt[1:])
        self.sentences: list[str] = []
        self.embeddings: list[np.ndarray] = []
        self.actions: list[int] = []
        self.ended: str | None = None
        self.given = np.zeros(0, dtype=np.int64) if given is None else given
        self._rows: list[int] = []
        self._prompt_tokens = len(prompt)
        self._tokenizer, self._language = tokenizer, language
        # Lines are split into sentences each on its own: what is above the current one does not change.
        self._above, self._sentences_above, self._line = "", 0, 1
        self.read()
        self.first = len(self.sentences)
        self._within = self._sentences_of_prompt()

    @property
    def written(self) -> list[int]:
        """Ids of the tokens after the prompt."""
        return self.text.tokens[self._prompt_tokens :]

    @property
    def whole(self) -> str:
        """The text with its prompt."""
        return self._above + decoded(self._tokenizer, self.text.tokens[self._line :])

    @property
    def plan(self) -> list[int]:
        """The action of each sentence after the prompt, of those that the text has so far."""
        sentences = len(sentence_spans(self.whole, self._language))
        return self.actions[self.first : max(sentences, self.first)]

    @property
    def unplanned(self) -> range:
        """The sentences, up to the one that the next token is in, that have no action yet."""
        return range(len(self.actions), len(self.sentences) + 1)

    def read(self) -> None:
        """Finds the complete sentences; forgets what was known of sentences that the last token changed."""
        line = decoded(self._tokenizer, self.text.tokens[self._line :])
        found = [line[a:b].strip() for a, b in complete_spans(line, self._language)]
        same = self._sentences_above
        for old, new in zip(self.sentences[same:], found, strict=False):
            if old != new:
                break
            same += 1
        self.sentences = self.sentences[: self._sentences_above] + found
        self.embeddings = self.embeddings[:same]
        # A sentence's action comes from those before it.
        self.actions, self._rows = self.actions[: same + 1], self._rows[: same + 1]
        if len(f"{line}.".splitlines()) > len(line.splitlines()):  # it ends in a line break
            self._above, self._line = self._above + line, len(self.text.tokens)
            self._sentences_above = len(self.sentences)

    def add_actions(self, actions: Sequence[int], embeddings: Sequence[Tensor]) -> None:
        """Gives the unplanned sentences their actions and mixed embeddings `[dimensions]`."""
        self._rows += range(len(self.text.embeddings), len(self.text.embeddings) + len(embeddings))
        self.actions += actions
        self.text.embeddings += embeddings

    def alternate(self, embeddings: list[Tensor]) -> None:
        """Gives the sentences two embeddings in turn."""
        self.text.embeddings = embeddings
        self._rows = [sentence % 2 for sentence in range(len(self.sentences) + 1)]

    def carry(self) -> None:
        """Has every position up to the last one carry the action of the next token's sentence."""
        if not self.text.carried:
            self.text.carried += [self._rows[sentence] for sentence in self._within]
        self.text.carried.append(self._rows[len(self.sentences)])

    def _sentences_of_prompt(self) -> list[int]:
        """The sentence of every token of the prompt but the separator, known from all of the prompt."""
        ids, text = self.text.tokens[1:], self.prompt
        ends = _ends(self._tokenizer, ids)
        spans = sentence_spans(text, self._language)
        aligned = align(text, spans, np.stack([[0, *ends[:-1]], ends], axis=1) if ids else [])
        owner = np.searchsorted(spans[:, 0], aligned.spans[:, 0], side="right") - 1
        sentence = np.searchsorted(aligned.first_token, np.arange(len(ids)), side="right") - 1
        return np.minimum(owner[sentence], self.first).tolist() if len(owner) else [self.first] * len(ids)


Conditioner = Callable[[Sequence[GenerationState]], None]
"""Has the last position of every text carry an embedding, and those before it that carry none yet; ends texts
whose plan has run out."""


class Constant:
    """The same embedding for every position, whatever is written.

    Args:
        embedding: `[dimensions]`; None where nothing is conditioned.
    """

    def __init__(self, embedding: Tensor | None) -> None:
        self._embeddings = [] if embedding is None else [embedding]

    def __call__(self, states: Sequence[GenerationState]) -> None:
        """Has every position carry it."""
        for state in states:
            text = state.text
            text.embeddings = self._embeddings
            text.carried += [0] * (len(text.tokens) - len(text.carried))


class ConstantBySentence:
    """The same embedding for every sentence, each told apart from the one before it, for planning tokens.

    Args:
        embedding: `[dimensions]`.
    """

    def __init__(self, embedding: Tensor) -> None:
        self._embedding = embedding

    def __call__(self, states: Sequence[GenerationState]) -> None:
        """Has the positions of every sentence carry it."""
        for state in states:
            state.read()
            state.alternate([self._embedding, self._embedding])
            state.carry()


@dataclass(frozen=True)
class _BySentence(ABC):
    """One embedding for each sentence, chosen when all before it are complete.

    Attributes:
        adapter: Whose codebook it is.
        encoder: Embeds every sentence, once.
        device: Where the adapter is.
    """

    adapter: Adapter
    encoder: SentenceEncoder | TrainableEncoder
    device: torch.device

    def __call__(self, states: Sequence[GenerationState]) -> None:
        for state in states:
            state.read()
        going = [state for state in states if not self._ends(state)]
        new = [sentence for state in going for sentence in state.sentences[len(state.embeddings) :]]
        found = iter(self.encoder.encode(new) if new else [])
        for state in going:
            state.embeddings += [next(found) for _ in state.sentences[len(state.embeddings) :]]
        if unplanned := [state for state in going if state.unplanned]:
            self._plan(unplanned)
        for state in going:
            state.carry()

    def _ends(self, state: GenerationState) -> bool:
        return False

    @abstractmethod
    def _plan(self, states: Sequence[GenerationState]) -> None:
        """Gives the unplanned sentences of texts, which have some, their actions and embeddings."""


@dataclass(frozen=True)
class Planned(_BySentence):
    """Actions that the planner predicts from the sentences so far.

    Attributes:
        planner: Scores the next sentence's action.
        mixing: Turns the scores into an embedding.
        temperature: Of the softmax over scores.
        precision: The setting `training.precision`.
    """

    planner: Planner
    mixing: Mixing
    temperature: float | Tensor
    precision: str

    def _plan(self, states: Sequence[GenerationState]) -> None:
        most = max(len(state.sentences) for state in states)
        context = np.zeros((len(states), most + 1, self.encoder.dimensions), dtype=np.float32)
        for row, state in enumerate(states):
            if state.embeddings:
                context[row, : len(state.embeddings)] = state.embeddings
        with autocast(self.device, self.precision):
            every = self.planner(torch.from_numpy(context).to(self.device))
            scores = torch.cat([every[row, state.unplanned] for row, state in enumerate(states)])
            none = scores.new_zeros(len(scores), dtype=torch.long)
            embeddings = self.mixing(scores, none, self.adapter.codebook, self.temperature)
        sizes = [len(state.unplanned) for state in states]
        actions = scores.argmax(dim=-1).split(sizes)
        for state, own_actions, rows in zip(states, actions, embeddings.split(sizes), strict=True):
            state.add_actions(own_actions.tolist(), list(rows))


@dataclass(frozen=True)
class Given(_BySentence):
    """A plan that is given for the sentences after the prompt; those of the prompt have their own action.

    Attributes:
        codebook: Finds a sentence's own action, its nearest centroid.
    """

    codebook: Codebook

    def _ends(self, state: GenerationState) -> bool:
        if len(state.sentences) - state.first >= len(state.given):
            state.ended = "plan"
        return state.ended is not None

    def _plan(self, states: Sequence[GenerationState]) -> None:
        for state in states:
            past = np.array(state.embeddings[: state.first]).reshape(-1, self.encoder.dimensions)
            own, plan = self.codebook.nearest(past), state.given
            actions = [
                int(own[sentence] if sentence < len(own) else plan[max(sentence - state.first, 0)])
                for sentence in state.unplanned
            ]
            chosen = torch.tensor(actions, device=self.device)
            state.add_actions(actions, list(Oracle()(chosen, chosen, self.adapter.codebook, 1.0)))


def conditioner_of(
    model: PlannedLM,
    variant: VariantName,
    encoder: Callable[[], SentenceEncoder | TrainableEncoder],
    precision: str,
    plan_codebook: Codebook | None = None,
) -> Conditioner:
    """The conditioner of a trained variant: a given plan, the planner's, or one embedding everywhere.

    Args:
        model: The trained model.
        variant: The variant that conditions it.
        encoder: Loads the encoder that the planner reads; called only where sentences are embedded.
        precision: The setting `training.precision`.
        plan_codebook: Set where plans are given: it labels the sentences of the prompts.

    Raises:
        ProbekitError: Plans are given, but the variant is not conditioned on actions.
    """
    adapter = model.adapter
    mixing = None if adapter is None else VARIANTS[variant].evaluation
    if plan_codebook is not None and (mixing is None or not mixing.needs_scores):
        raise ProbekitError(
            f"variant {variant!r} follows no plan, so none can be given; choose one that is conditioned on "
            "actions"
        )
    if adapter is None or mixing is None:
        return Constant(None)
    device = adapter.codebook.device
    if not mixing.needs_scores:
        none = torch.zeros(1, dtype=torch.long, device=device)
        embedding = mixing(none, none, adapter.codebook, model.temperature)[0]
        return ConstantBySentence(embedding) if adapter.inserts else Constant(embedding)
    if plan_codebook is not None:
        return Given(adapter, encoder(), device, plan_codebook)
    assert model.planner is not None  # noqa: S101 - an adapter is trained after its planner
    return Planned(adapter, encoder(), device, model.planner, mixing, model.temperature, precision)
