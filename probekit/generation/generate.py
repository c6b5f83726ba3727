"""Text from a trained run, each sentence conditioned on the action that is planned for it.

As in training, position t carries the action of the sentence that holds token t + 1. So before each token is
drawn, the splitter decides whether the text's last sentence is complete (`data.sentences.complete_spans`). If
so, the run's encoder embeds it, and the planner scores the next sentence's action from all sentences so far.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.config import Config, GenerationSettings, ModelName, user_path
from probekit.data.sentences import complete_spans, sentence_spans
from probekit.data.special_tokens import drawable_ids
from probekit.errors import ProbekitError
from probekit.generation.prompts import Plan, Prompt, document_prompts, planned_prompts, text_prompt
from probekit.io import write_out
from probekit.models.decoding import new_decoder
from probekit.models.generation_state import Conditioner, GenerationState, conditioner_of
from probekit.models.language_model import longest_window
from probekit.models.mixing import VARIANTS, Soft
from probekit.progress import Progress, Task
from probekit.run.run import Run

TOKENS = 128
"""Tokens that are written for a prompt by default."""

MOST_TOKENS = 1_000_000
"""More would be written for days."""

DOCUMENTS = 4
"""Test documents whose beginnings `probekit generate` continues by default."""


def draw(logits: Tensor, uniforms: Tensor, settings: GenerationSettings) -> Tensor:
    """Draws a token for each text `[texts]`.

    `top_p` renormalises what `top_k` leaves, and keeps the token that crosses it.

    Args:
        logits: `[texts, vocabulary]`; minus infinity is never drawn.
        uniforms: A number in [0, 1) for each text `[texts]`, on which alone its draw depends. Not used where
            the temperature is 0.
        settings: Temperature, `top_k`, `top_p`.
    """
    if settings.temperature == 0.0:
        return logits.argmax(dim=-1)
    scaled, tokens = logits.double() / settings.temperature, None
    if settings.top_k or settings.top_p:
        scaled, tokens = scaled.topk(min(settings.top_k or logits.shape[1], logits.shape[1]), dim=-1)
    probabilities = scaled.softmax(dim=-1)
    if settings.top_p:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= settings.top_p, 0.0)
    reached = probabilities.cumsum(dim=-1)
    wanted = uniforms[:, None] * reached[:, -1:]
    # The first that reaches beyond, which is never one of probability 0.
    drawn = (reached > wanted).to(torch.uint8).argmax(dim=-1, keepdim=True)
    return (drawn if tokens is None else tokens.gather(1, drawn))[:, 0]


def without_others(logits: Tensor, drawable: Tensor) -> Tensor:
    """Logits `[texts, vocabulary]` with minus infinity for tokens that are not among the drawable ones."""
    drawable = drawable[drawable < logits.shape[1]]  # an embedding may lack tokens that stand for pictures
    return torch.full_like(logits, -torch.inf).index_copy(1, drawable, logits[:, drawable])


@dataclass(frozen=True)
class Generated:
    """A continuation.

    Attributes:
        tokens: Token ids after the prompt.
        text: The same as text.
        plan: The action given to each of its sentences, the planner's most probable one where actions are
            mixed; empty where nothing is planned.
        ended: Why it ended: `length`, or `plan` where the given plan ran out.
    """

    tokens: np.ndarray
    text: str
    plan: np.ndarray
    ended: str


def reading_window(run: Run) -> int:
    """Tokens that the LM reads at once when it writes.

    All its positions, but no more than the training window if the LM was trained here.
    """
    positions = longest_window(run.frozen_lm().config)
    return positions if run.config.lm.name else min(positions, run.config.training.window)


def usual_variant(run: Run) -> ModelName:
    """The variant that writes by default: `soft`, the last that is trained, or the last ensemble."""
    if run.config.method == "depth-ensemble" and (members := run.members):
        return members[-1]
    trained = run.variants
    return "soft" if "soft" in trained else trained[-1] if trained else "none"


def generate(
    run: Run | str | Path,
    prompts: str | Prompt | Iterable[str | Prompt],
    *,
    variant: ModelName | None = None,
    settings: GenerationSettings | Mapping[str, Any] | None = None,
    tokens: int = TOKENS,
    plan: Plan = "planner",
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
    title: str | None = None,
) -> list[Generated]:
    """Continues prompts.

    The separator and other special tokens, which stand inside no document, are never drawn.

    Args:
        run: The run or its folder.
        prompts: Texts or prompts to be continued, or a single one.
        variant: The variant, or member of a depth ensemble, that writes; scores are mixed as in its
            evaluation. Unset: `usual_variant`.
        settings: Temperature, `top_k` and `top_p`, or settings to replace by dotted name, such as
            `generation.top_k`; unset: the run's own.
        tokens: How many are written for each prompt.
        plan: `planner`; `given`, where each prompt has a plan; or actions, the plan of every prompt. With a
            plan, the sentences of a prompt carry their own action, the nearest centroid.
        seed: Seed of the draws. A text's draws depend on this and on its number among the prompts alone.
        cache: Keep the LM's keys and values from token to token, which is faster. This and the batch size
            change what is written only by rounding: hardly ever in float32, now and then in bfloat16.
        progress: Shows how far it is.
        title: Name of the task in the progress display.

    Returns:
        A continuation of each prompt, in their order.

    Raises:
        ProbekitError: The variant is not trained or follows no plan, something is no prompt, no token is to
            be written, or a plan is missing, empty, or has unknown actions.
    """
    run = Run.at(run)
    run.require_causal()
    if isinstance(settings, Mapping):
        run, settings = run.with_settings(settings), None
    settings = settings or run.config.generation
    progress = progress or Progress(quiet=True)
    whole = isinstance(tokens, int | np.integer) and not isinstance(tokens, bool)
    if not whole or not 1 <= tokens <= MOST_TOKENS:
        raise ProbekitError(f"tokens is {tokens!r}; it must be a whole number from 1 to {MOST_TOKENS:,}")
    known, seed = planned_prompts(run.corpus, prompts, plan), Config().override({"seed": seed}).seed
    variant = usual_variant(run) if variant is None else variant
    if not isinstance(variant, str):
        raise ProbekitError(f"variant is {variant!r}; give the name of one")
    model, conditioning = run.model(variant), run.variant_of(variant)
    given = not (isinstance(plan, str) and plan == "planner")
    # Given plans are the corpus's actions: its own encoder labels the sentences of the prompts.
    encoder = partial(run.encoder, "none" if given else conditioning)
    precision, codebook = run.config.training.precision, run.corpus.codebook if given else None
    condition = conditioner_of(model, conditioning, encoder, precision, codebook)
    decoder = new_decoder(model, model.backend, reading_window(run), run.corpus.bos_rule, cache=cache)
    if cache and not decoder.cached:
        inserts = model.adapter is not None and model.adapter.inserts
        why = "there are planning tokens between a text's own" if inserts else "this LM gives none"
        progress.say(f"no keys and values are kept ({why}): each token reads the whole window again")
    tokenizer = run.corpus.tokenizer
    drawable = torch.from_numpy(drawable_ids(tokenizer)).to(run.device)

    def next_logits(states: Sequence[GenerationState]) -> Tensor:
        with run.autocast():
            logits = decoder([state.text for state in states]).float()
        return without_others(logits, drawable)

    # Texts of about the same length share a batch, so that little is padded.
    order = np.argsort([len(prompt.tokens) for prompt in known], kind="stable")
    batch_size = run.config.evaluation.batch_size
    results: dict[int, Generated] = {}
    title = title or f"generate ({variant})"
    with progress.task(title, total=tokens * len(known)) as task, torch.no_grad():
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size].tolist()
            states = [
                GenerationState(
                    known[n].tokens.tolist(), tokenizer, run.config.corpus.language, known[n].plan
                )
                for n in numbers
            ]
            generators = [np.random.default_rng([seed, n]) for n in numbers]
            _write(states, generators, condition, next_logits, settings, tokens, task)
            for n, state in zip(numbers, states, strict=True):
                text, actions = state.whole[len(state.prompt) :], np.array(state.plan, dtype=np.int64)
                written = np.array(state.written, dtype=np.int64)
                results[n] = Generated(written, text, actions, state.ended or "length")
    return [results[n] for n in range(len(known))]


def _write(
    states: Sequence[GenerationState],
    generators: Sequence[np.random.Generator],
    condition: Conditioner,
    next_logits: Callable[[Sequence[GenerationState]], Tensor],
    settings: GenerationSettings,
    tokens: int,
    task: Task,
) -> None:
    """Adds a token to each text at a time until all have ended; each draws from a generator of its own."""
    generator = dict(zip(states, generators, strict=True))
    going = list(states)
    while going:
        condition(going)
        going = [state for state in going if state.ended is None]
        if not going:
            return
        logits = next_logits(going)
        # In float32 a number just below 1 would be 1.
        uniforms = torch.tensor([generator[state].random() for state in going], dtype=torch.float64)
        drawn = draw(logits, uniforms.to(logits.device), settings).tolist()
        for state, token in zip(going, drawn, strict=True):
            state.text.tokens.append(token)
            state.ended = "length" if len(state.written) == tokens else None
        task.advance(len(going))
        going = [state for state in going if state.ended is None]


@dataclass(frozen=True)
class Written:
    """Texts that a variant wrote.

    Attributes:
        variant: The variant.
        prompts: The prompts.
        continuations: Their continuations.
        sentences: The sentences of each continuation, with the action given to each; None where none was.
        window: Tokens that the LM reads at once.
        mixed: Whether actions were mixed, so that a sentence's is only the most probable one.
        lacking: How many of the texts asked for lack a test document that is long enough.
    """

    variant: ModelName
    prompts: list[Prompt]
    continuations: list[Generated]
    sentences: list[list[tuple[str, int | None]]]
    window: int
    mixed: bool = False
    lacking: int = 0

    @property
    def slid(self) -> int:
        """How many texts grew longer than the LM reads at once."""
        pairs = zip(self.prompts, self.continuations, strict=True)
        return sum(len(prompt.tokens) + len(more.tokens) - 1 > self.window for prompt, more in pairs)

    def save(self, path: str | Path) -> None:
        """Writes a line of JSON for each text.

        Raises:
            ProbekitError: The file cannot be written.
        """
        rows = [
            {
                "document": None if prompt.document < 0 else prompt.document,
                "variant": self.variant,
                "prompt": prompt.text,
                "text": more.text,
                "sentences": [{"text": text, "action": action} for text, action in sentences],
                "ended": more.ended,
                "tokens": more.tokens.tolist(),
            }
            for prompt, more, sentences in zip(self.prompts, self.continuations, self.sentences, strict=True)
        ]
        write_out(user_path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_texts(
    run: Run,
    texts: Sequence[str] | None = None,
    *,
    documents: int | None = None,
    samples: int | None = None,
    variant: ModelName | None = None,
    tokens: int = TOKENS,
    plan: str | None = None,
    progress: Progress | None = None,
) -> Written:
    """Continues texts, the beginnings of test documents, or nothing at all, as `probekit generate` does.

    Args:
        run: The run; its settings `generation` and its seed count.
        texts: Prompts, which may be empty.
        documents: How many test documents are continued, if no texts are; 4 by default.
        samples: How many texts are written from nothing, in place of both.
        variant: The variant that writes; `usual_variant` by default.
        tokens: Tokens written for each.
        plan: Actions with commas between them, for every text, or `oracle`, a document's own; unset: the
            planner's.
        progress: Shows how far it is.

    Raises:
        ProbekitError: The plan cannot be read or does not fit, or no document is long enough.
    """
    variant = variant or usual_variant(run)
    for name, count in (("samples", samples), ("documents", documents)):
        if count is not None and count < 1:
            raise ProbekitError(f"--{name} is {count}; it must be 1 or more")
    if samples is not None:
        texts = [""] * samples
    if plan == "oracle" and texts is not None:
        raise ProbekitError("--plan oracle is the plan of a document: it goes with --documents")
    if texts is None:
        wanted = documents or DOCUMENTS
        prompts = _beginnings(run, wanted)
    else:
        wanted, prompts = len(texts), [text_prompt(run.corpus, text) for text in texts]
    continuations = generate(
        run,
        prompts,
        variant=variant,
        tokens=tokens,
        plan=_parsed_plan(plan),
        seed=run.config.seed,
        progress=progress,
    )
    language = run.config.corpus.language
    sentences = [
        sentences_of(prompt, more, language) for prompt, more in zip(prompts, continuations, strict=True)
    ]
    conditioning = run.variant_of(variant)
    soft = conditioning in VARIANTS and isinstance(VARIANTS[conditioning].evaluation, Soft)
    return Written(
        variant,
        prompts,
        continuations,
        sentences,
        reading_window(run),
        mixed=plan is None and soft,
        lacking=wanted - len(prompts),
    )


def _beginnings(run: Run, count: int) -> list[Prompt]:
    """Beginnings of the first test documents that are long enough."""
    context, language = run.config.generation.context, run.config.corpus.language
    prompts, _ = document_prompts(run.corpus, run.corpus.documents("test"), context, 1, language, count)
    if not prompts:
        raise ProbekitError(
            f"no test document goes on after its first {context} tokens; lower generation.context"
        )
    return prompts


def _parsed_plan(plan: str | None) -> Plan:
    if plan is None or plan == "oracle":
        return "planner" if plan is None else "given"
    try:
        return [int(action) for action in plan.split(",")]
    except ValueError:
        raise ProbekitError(
            f"--plan is {plan!r}; give actions with commas between them, such as 12,7,7,40, or oracle"
        ) from None


def sentences_of(prompt: Prompt, generated: Generated, language: str) -> list[tuple[str, int | None]]:
    """The sentences of a finished continuation, each with the action given to it.

    The first may go on with a sentence that the prompt began. The action is None where nothing was planned,
    and for a sentence that the splitter did not separate while the text was written.
    """
    text, behind = prompt.text + generated.text, len(prompt.text)
    first = len(complete_spans(prompt.text, language))
    found = []
    for number, (start, end) in enumerate(sentence_spans(text, language)):
        planned = number - first
        if (shown := text[max(start, behind) : end].strip()) and end > behind:
            known = 0 <= planned < len(generated.plan)
            found.append((shown, int(generated.plan[planned]) if known else None))
    return found
