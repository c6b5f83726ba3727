"""Text from a trained run, each sentence conditioned on the action that is planned for it.

As in training, position t carries the action of the sentence that holds token t + 1. So before a token is
drawn, it is decided whether the last sentence of the text so far is over (`corpus.sentences.complete_spans`
has the rule, and how hindsight may differ); where it is, that sentence is embedded with the run's own encoder
and the planner scores the next one's action from all sentences so far, those of the prompt too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.config import GenerationSettings, ModelName
from probekit.distributed import autocast
from probekit.errors import ProbekitError
from probekit.generation.prompts import Plan, Prompt, planned_prompts
from probekit.models.decoding import Decoder, new_decoder
from probekit.models.language_model import longest_window
from probekit.models.replanning import Conditioner, Draft, conditioner_of
from probekit.progress import Progress, Task
from probekit.run.run import Run


def draw(logits: Tensor, uniforms: Tensor, settings: GenerationSettings) -> Tensor:
    """Draws a token for each text `[texts]`.

    `top_p` counts what `top_k` leaves as all there is, and keeps the token that crosses it.

    Args:
        logits: `[texts, vocabulary]`; minus infinity is never drawn.
        uniforms: Numbers from 0 to 1, without 1, one for each text `[texts]`: what is drawn of a text depends
            on its own alone. Not used where the temperature is 0.
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
    # The first that reaches beyond: one of probability 0 never is.
    place = (reached > wanted).to(torch.uint8).argmax(dim=-1, keepdim=True)
    return (place if tokens is None else tokens.gather(1, place))[:, 0]


TOKENS = 128
"""Tokens that are written for a prompt if nothing else is asked for."""

LAST = "ln_final.hook_out"
"""A hook that any LM has, to run one that nothing conditions."""


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


def reading_window(run: Run) -> int:
    """Tokens that the LM reads at once when it writes: all its positions, if these are trained.

    A new LM has seen no more of them than the training window has.
    """
    positions = longest_window(run.base_lm().config)
    return positions if run.config.lm.name else min(positions, run.config.training.window)


def usual_variant(run: Run) -> ModelName:
    """What writes if nothing is named: `soft` or the last variant that is trained, or the last ensemble."""
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
        prompts: What is continued: texts or prompts, or a single one.
        variant: Which variant, or member of a depth ensemble, writes; the scores become embeddings as when
            it is evaluated. Unset: `usual_variant`.
        settings: Temperature, `top_k`, `top_p` and the batch size, or settings to replace by dotted name,
            such as `generation.top_k`; unset: the run's own.
        tokens: How many are written for each prompt.
        plan: `planner`; `given`: each prompt has a plan, which is obeyed; or actions, the plan of every
            prompt. With a plan, the sentences of a prompt carry their own action, the nearest centroid.
        seed: Seed of what is drawn. For a text it depends on this and on its number among the prompts, not on
            what else is written.
        cache: Keep the LM's keys and values from token to token. Without, writing takes longer. Neither
            this nor the batch changes what is written but by rounding: hardly ever in float32, where two
            tokens are as good as equal; now and then in bfloat16 (`training.precision`).
        progress: Shows how far it is.
        title: What progress calls it.

    Returns:
        A continuation of each prompt, in their order.

    Raises:
        ProbekitError: The variant is not trained or obeys no plan, something is no prompt, no token is to be
            written, or a plan is missing, empty, or has unknown actions.
    """
    run = Run.at(run)
    if isinstance(settings, Mapping):
        run, settings = run.with_settings(settings), None
    settings = settings or run.config.generation
    progress = progress or Progress(quiet=True)
    _check_tokens(tokens)
    known = planned_prompts(run.corpus, prompts, plan)
    variant = variant or usual_variant(run)
    model = run.model(variant)
    given = not (isinstance(plan, str) and plan == "planner")
    planned = run.variant_of(variant)
    # Given plans are the corpus's actions: its own encoder labels the sentences of the prompts.
    encoder = partial(run.encoder, "none" if given else planned)
    conditioned = conditioner_of(
        model, planned, encoder, run.config.training.precision, run.corpus.codebook if given else None
    )
    backend = run.forward_pass(model.names or [LAST], variant)
    decoder = new_decoder(model, backend, reading_window(run), cache=cache)
    if cache and not decoder.cached:
        inserts = model.adapter is not None and model.adapter.inserts
        why = "there are planning tokens between a text's own" if inserts else "this LM gives none"
        progress.say(f"no keys and values are kept ({why}): each token reads the whole window again")
    scribe = _Scribe(run, decoder, conditioned, settings, tokens)
    # Texts of a length go together, so that little is padded.
    order = np.argsort([len(prompt.tokens) for prompt in known], kind="stable")
    results: dict[int, Generated] = {}
    batch_size = run.config.evaluation.batch_size
    title = title or f"generate ({variant})"
    with progress.task(title, total=tokens * len(known)) as task, torch.no_grad():
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size].tolist()
            drafts = [
                Draft(
                    known[n].tokens.tolist(), run.corpus.tokenizer, run.config.corpus.language, known[n].plan
                )
                for n in numbers
            ]
            scribe.write(drafts, [np.random.default_rng([seed, n]) for n in numbers], task)
            results |= {n: _result(draft) for n, draft in zip(numbers, drafts, strict=True)}
    return [results[n] for n in range(len(known))]


def _check_tokens(tokens: object) -> None:
    whole = isinstance(tokens, int | np.integer) and not isinstance(tokens, bool)
    if not (whole and tokens >= 1):  # type: ignore[operator]
        raise ProbekitError(f"tokens is {tokens!r}; it must be a whole number, 1 or more")


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


def _result(draft: Draft) -> Generated:
    return Generated(
        np.array(draft.written, dtype=np.int64),
        draft.whole[len(draft.prompt) :],
        np.array(draft.plan, dtype=np.int64),
        draft.ended or "length",
    )
