"""Text from a trained run, each sentence conditioned on the action that is planned for it.

As in training, position t carries the action of the sentence that holds token t + 1. So before a token is
drawn, it is decided whether the last sentence of the text so far is over (`corpus.sentences.complete_spans`
has the rule, and how hindsight may differ); where it is, that sentence is embedded with the run's own encoder
and the planner scores the next one's action from all sentences so far, those of the prompt too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from probekit.config import GenerationSettings, VariantName
from probekit.corpus.sentences import complete_spans, sentence_spans
from probekit.corpus.store import Corpus
from probekit.devices import autocast
from probekit.errors import ProbekitError
from probekit.evaluation.drafts import Conditioner, Constant, Draft, Given, Planned, decoded
from probekit.evaluation.sampling import draw
from probekit.models.decoding import Decoder, new_decoder
from probekit.models.language_model import longest_window
from probekit.models.mixing import VARIANTS
from probekit.models.planned_lm import PlannedLM
from probekit.progress import Progress, Task
from probekit.run import Run

Plan = Literal["planner", "given"]

LAST = "ln_final.hook_out"
"""A hook that any LM has, to run one that nothing conditions."""


@dataclass(frozen=True)
class Prompt:
    """What is continued.

    Attributes:
        tokens: Ids, the separator first; just the separator where text is to begin from nothing.
        text: The same as text, without the separator.
        plan: Actions of the sentences to come, first that of the sentence that the next token is in.
        document: The document of the corpus that it begins, -1 for none.
    """

    tokens: np.ndarray
    text: str
    plan: np.ndarray | None = None
    document: int = -1


@dataclass(frozen=True)
class Generated:
    """A continuation.

    Attributes:
        tokens: Ids behind the prompt.
        text: The same as text.
        plan: The action given to each of its sentences, in their order, the planner's most probable one where
            it was mixed with others; empty where nothing is planned.
        ended: Why it ended: `length`, or `plan` where the given plan ran out.
    """

    tokens: np.ndarray
    text: str
    plan: np.ndarray
    ended: str


def text_prompt(corpus: Corpus, text: str, plan: Sequence[int] | np.ndarray | None = None) -> Prompt:
    """A prompt of any text, the empty one too, and any plan."""
    ids = corpus.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    actions = None if plan is None else np.array(plan, dtype=np.int64)
    return Prompt(np.array([corpus.separator, *ids], dtype=np.int64), decoded(corpus.tokenizer, ids), actions)


def document_prompts(
    corpus: Corpus, documents: np.ndarray, context: int, tokens: int, language: str = "en"
) -> tuple[list[Prompt], list[np.ndarray]]:
    """Beginnings of documents, and how they truly go on.

    Args:
        corpus: The corpus.
        documents: Numbers of documents; those too short are passed over.
        context: A prompt goes on to the first end of a sentence behind this many tokens, one that is told
            as such by what stands before it.
        tokens: Tokens of the true continuation, which has to have as many.
        language: The setting `corpus.language`.

    Returns:
        The prompts, with the true actions from there on as their plans, and the continuations `[tokens]`.
    """
    prompts, continuations = [], []
    for document in documents:
        begin, end = corpus.document_tokens[document : document + 2]
        first, last = corpus.document_sentences[document : document + 2]
        for sentence in range(first + 1, last):
            cut = int(corpus.first_token[sentence])
            if cut + tokens > end:
                break
            text = decoded(corpus.tokenizer, corpus.tokens[begin + 1 : cut])
            if cut - begin - 1 >= context and _is_over(text, language):
                plan = corpus.actions[sentence:last].astype(np.int64)
                prompts.append(Prompt(corpus.tokens[begin:cut].astype(np.int64), text, plan, int(document)))
                continuations.append(corpus.tokens[cut : cut + tokens].astype(np.int64))
                break
    return prompts, continuations


def _is_over(text: str, language: str) -> bool:
    """Whether the last sentence of a text is complete."""
    return len(complete_spans(text, language)) == len(sentence_spans(text, language))


def reading_window(run: Run) -> int:
    """Tokens that the LM reads at once when it writes: all its positions, if these are trained.

    A new LM has seen no more of them than the training window has.
    """
    positions = longest_window(run.bridged.original_model)
    return positions if run.config.lm.name else min(positions, run.config.training.window)


def generate(
    run: Run | str | Path,
    prompts: Sequence[Prompt | str],
    *,
    variant: VariantName,
    settings: GenerationSettings | None = None,
    tokens: int,
    plan: Plan = "planner",
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
) -> list[Generated]:
    """Continues prompts.

    The separator and other special tokens, which stand inside no document, are never drawn.

    Args:
        run: The run or its folder.
        prompts: What is continued.
        variant: Which variant writes; the scores become embeddings as when it is evaluated.
        settings: Temperature, `top_k`, `top_p` and the batch size; unset: the run's own.
        tokens: How many are written for each prompt.
        plan: `planner`, or `given`: each prompt has a plan, which is obeyed. The sentences of a prompt then
            carry their own action, the centroid nearest to each.
        seed: Seed of what is drawn. For a text it depends on this and on its number among the prompts, not on
            what else is written.
        cache: Keep the LM's keys and values from token to token. Without, the same is written, slower.
        progress: Shows how far it is.

    Returns:
        A continuation of each prompt, in their order.

    Raises:
        ProbekitError: The variant is not trained, no token is to be written, or a plan is missing, empty, or
            has unknown actions.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    settings = settings or run.config.generation
    progress = progress or Progress(quiet=True)
    known = [text_prompt(run.corpus, p) if isinstance(p, str) else p for p in prompts]
    if tokens < 1:
        raise ProbekitError(f"tokens is {tokens}; it must be 1 or more")
    if plan == "given":
        _check_plans(run.corpus, known, variant)
    model = run.model(variant)
    road = run.forward_pass([LAST] if model.adapter is None else model.adapter.names, variant)
    decoder = new_decoder(model, road, reading_window(run), cache=cache)
    if cache and not decoder.cached:
        progress.say("this LM keeps no keys and values here: the whole window is read again for every token")
    scribe = _Scribe(run, decoder, _conditioner(run, model, variant, plan), settings, tokens)
    # Texts of a length go together, so that little is padded.
    order = np.argsort([len(prompt.tokens) for prompt in known], kind="stable")
    results: dict[int, Generated] = {}
    with progress.task(f"generate ({variant})", total=tokens * len(known)) as task, torch.no_grad():
        for start in range(0, len(order), settings.batch_size):
            numbers = order[start : start + settings.batch_size].tolist()
            drafts = [
                Draft(
                    known[n].tokens.tolist(), run.corpus.tokenizer, run.config.corpus.language, known[n].plan
                )
                for n in numbers
            ]
            scribe.write(drafts, [np.random.default_rng([seed, n]) for n in numbers], task)
            results |= {n: _result(draft) for n, draft in zip(numbers, drafts, strict=True)}
    return [results[n] for n in range(len(known))]


class _Scribe:
    """Writes on drafts, a token of each at a time."""

    def __init__(
        self,
        run: Run,
        decoder: Decoder,
        conditioner: Conditioner,
        settings: GenerationSettings,
        tokens: int,
    ) -> None:
        self._decoder, self._conditioner = decoder, conditioner
        self._settings, self._tokens = settings, tokens
        self._device, self._precision = run.device, run.config.training.precision
        self._special = torch.tensor(run.corpus.tokenizer.all_special_ids, device=run.device)
        self._known = len(run.corpus.tokenizer)

    def write(self, drafts: Sequence[Draft], generators: Sequence[np.random.Generator], task: Task) -> None:
        """Writes until every draft has ended; each draws from a generator of its own."""
        generator = dict(zip(drafts, generators, strict=True))
        going = list(drafts)
        while going:
            self._conditioner(going)
            going = [draft for draft in going if draft.ended is None]
            if not going:
                return
            # In float32 a number just below 1 would be 1.
            uniforms = torch.tensor([generator[draft].random() for draft in going], dtype=torch.float64)
            for draft, token in zip(going, self._drawn(going, uniforms.to(self._device)), strict=True):
                draft.text.tokens.append(token)
                draft.ended = "length" if len(draft.written) == self._tokens else None
            task.advance(len(going))
            going = [draft for draft in going if draft.ended is None]

    def _drawn(self, drafts: Sequence[Draft], uniforms: Tensor) -> list[int]:
        with autocast(self._device, self._precision):
            logits = self._decoder([draft.text for draft in drafts]).float()
        logits[:, self._known :] = -torch.inf  # rows of the embedding that no token has
        logits[:, self._special[self._special < logits.shape[1]]] = -torch.inf
        return draw(logits, uniforms, self._settings).tolist()


def _conditioner(run: Run, model: PlannedLM, variant: VariantName, plan: Plan) -> Conditioner:
    """How a variant conditions drafts: on given plans, on the planner's, or the same everywhere."""
    if model.adapter is None:
        return Constant(None)
    mixing = VARIANTS[variant].evaluation
    if plan == "planner" and not mixing.needs_scores:
        none = torch.zeros(1, dtype=torch.long, device=run.device)
        return Constant(mixing(none, none, model.adapter.codebook, model.temperature)[0])
    if plan == "given":
        return Given(model.adapter, run.encoder(), run.device, run.corpus.codebook)
    assert model.planner is not None  # noqa: S101 - an adapter is trained behind its planner
    precision = run.config.training.precision
    encoder = run.encoder(variant)
    return Planned(model.adapter, encoder, run.device, model.planner, mixing, model.temperature, precision)


def _result(draft: Draft) -> Generated:
    return Generated(
        np.array(draft.written, dtype=np.int64),
        draft.whole[len(draft.prompt) :],
        np.array(draft.plan, dtype=np.int64),
        draft.ended or "length",
    )


def _check_plans(corpus: Corpus, prompts: Sequence[Prompt], variant: VariantName) -> None:
    if variant == "none":
        raise ProbekitError(
            "variant 'none' is conditioned on no action, so no plan can be given; choose another"
        )
    for number, prompt in enumerate(prompts):
        if prompt.plan is None or not len(prompt.plan):
            raise ProbekitError(f"prompt {number} has no plan; give it the action of a sentence or more")
        unknown = prompt.plan[(prompt.plan < 0) | (prompt.plan >= corpus.k)]
        if len(unknown):
            raise ProbekitError(
                f"the plan of prompt {number} has the action {unknown[0]}, which the codebook lacks; its "
                f"actions go from 0 to {corpus.k - 1}"
            )
