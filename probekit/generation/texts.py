"""What `probekit generate` continues, and what comes of it: prompts from files, sentences, JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probekit.config import ModelName
from probekit.data.sentences import complete_spans, sentence_spans
from probekit.errors import ProbekitError
from probekit.generation.generate import TOKENS, Generated, generate, reading_window, usual_variant
from probekit.generation.prompts import Plan, Prompt, document_prompts, text_prompt
from probekit.io import write_text
from probekit.models.mixing import VARIANTS, Soft
from probekit.progress import Progress
from probekit.run.run import Run

DOCUMENTS = 4
"""Test documents whose beginnings are continued if nothing else is asked for."""
ORACLE = "oracle"
"""The plan of what is true of a document."""


@dataclass(frozen=True)
class Written:
    """Texts that a variant wrote.

    Attributes:
        variant: Which.
        prompts: What was continued.
        continuations: How.
        sentences: The sentences of each continuation, with the action given to each; None where none was.
        window: Tokens that the LM reads at once.
        mixed: Whether all actions were mixed, and the one given to a sentence is the most probable one.
        lacking: How many texts were asked for that no test document could begin.
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
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            write_text(path, lines)
        except OSError as error:  # which names a temporary file
            raise ProbekitError(f"--out {path}: cannot be written ({error.strerror})") from None


def check_out(path: str | Path) -> None:
    """Refuses a place where no file can be written.

    Raises:
        ProbekitError: Its folder does not exist, or it is a folder itself.
    """
    path = Path(path)
    if path.is_dir():
        raise ProbekitError(f"--out {path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ProbekitError(f"--out {path}: there is no folder {path.parent}")


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
    """Continues texts, the beginnings of test documents, or nothing at all.

    Args:
        run: The run; its settings `generation` and its seed count.
        texts: Prompts, the empty one too.
        documents: How many test documents are continued, if no texts are; a few by default.
        samples: How many texts are written with no prompt, in place of both.
        variant: Which variant writes; by default `usual_variant`.
        tokens: Tokens written for each.
        plan: Actions with commas between them, for every text, or `oracle`, a document's own; unset: the
            planner's.
        progress: Shows how far it is.

    Raises:
        ProbekitError: The plan cannot be read or fits nothing here, or no document is long enough.
    """
    variant = variant or usual_variant(run)
    if samples is not None:
        texts = [""] * _counted("samples", samples)
    if plan == ORACLE and texts is not None:
        raise ProbekitError("--plan oracle is the plan of a document: it goes with --documents")
    source: Plan = "planner" if plan is None else "given" if plan == ORACLE else _actions(plan)
    if texts is None:
        wanted = _counted("documents", DOCUMENTS if documents is None else documents)
        prompts = _beginnings(run, wanted)
    else:
        wanted, prompts = len(texts), [text_prompt(run.corpus, text) for text in texts]
    continuations = generate(
        run, prompts, variant=variant, tokens=tokens, plan=source, seed=run.config.seed, progress=progress
    )
    language = run.config.corpus.language
    sentences = [
        sentences_of(prompt, more, language) for prompt, more in zip(prompts, continuations, strict=True)
    ]
    planned = run.variant_of(variant)
    mixed = plan is None and planned in VARIANTS and isinstance(VARIANTS[planned].evaluation, Soft)
    window, lacking = reading_window(run), wanted - len(prompts)
    return Written(variant, prompts, continuations, sentences, window, mixed=mixed, lacking=lacking)


def sentences_of(prompt: Prompt, generated: Generated, language: str) -> list[tuple[str, int | None]]:
    """The sentences of a continuation as they are told in the end, each with the action given to it.

    The first may go on with a sentence that the prompt began. The action is None where nothing was planned,
    and for a sentence that was not told as one when it was written.
    """
    text, behind = prompt.text + generated.text, len(prompt.text)
    first = len(complete_spans(prompt.text, language))
    found = []
    for number, (start, end) in enumerate(sentence_spans(text, language)):
        place = number - first
        if (shown := text[max(start, behind) : end].strip()) and end > behind:
            known = 0 <= place < len(generated.plan)
            found.append((shown, int(generated.plan[place]) if known else None))
    return found


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a file: a line each or, where the name ends in `.jsonl`, the `text` of each line.

    Raises:
        ProbekitError: The file cannot be read, is empty, or a line holds no text.
    """
    try:
        lines = [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ProbekitError(f"--prompts {path}: cannot be read as UTF-8 text ({error})") from None
    if not lines:
        raise ProbekitError(f"--prompts {path}: holds no prompt; give one a line")
    return [_text(path, n, line) for n, line in enumerate(lines, 1)] if _is_json(path) else lines


def _is_json(path: str | Path) -> bool:
    return Path(path).suffix == ".jsonl"


def _text(path: str | Path, number: int, line: str) -> str:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ProbekitError(f'--prompts {path}: line {number} is no JSON object with a "text"')
    return row["text"]


def _beginnings(run: Run, count: int) -> list[Prompt]:
    context, language = run.config.generation.context, run.config.corpus.language
    prompts: list[Prompt] = []
    for document in run.corpus.documents("test"):
        prompts += document_prompts(run.corpus, np.array([document]), context, 1, language)[0]
        if len(prompts) == count:
            return prompts
    if not prompts:
        raise ProbekitError(
            f"no test document goes on behind its first {context} tokens; lower generation.context"
        )
    return prompts


def _counted(name: str, count: int) -> int:
    if count < 1:
        raise ProbekitError(f"--{name} is {count}; it must be 1 or more")
    return count


def _actions(plan: str) -> list[int]:
    try:
        return [int(action) for action in plan.split(",")]
    except ValueError:
        raise ProbekitError(
            f"--plan is {plan!r}; give actions with commas between them, such as 12,7,7,40, or oracle"
        ) from None
