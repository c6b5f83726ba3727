"""`probekit evaluate --generation`: generated text against true text, its words and its plan.

Every variant goes on with the beginnings of test documents, and makes texts from nothing. Continuations are
compared with the documents' own, cut at the same numbers of tokens: ROUGE-2, edit distance of the two
sequences of actions, whether sentences have the actions that they were given. Texts from nothing (samples)
are compared with the beginnings of test documents as a whole, by MAUVE. Latent perplexity, of both, tells how
usual a sequence of actions is. Beside them stands what true text gets in generated text's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.data.encoders import check_encoder
from probekit.evaluation.evaluate import variants_and_actions
from probekit.evaluation.perplexity import window_and_stride
from probekit.generation.generate import Generated, generate
from probekit.generation.metrics import (
    FEATURES,
    FEW_TEXTS,
    LEAST_TEXTS,
    cluster_texts,
    mauve_interval,
    text_features,
)
from probekit.generation.prompts import Plan, Prompt
from probekit.generation.true_texts import Tokens, TrueTexts, beginnings, continued_documents
from probekit.io import write_json, write_table
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import over_seeds

TRANSFORMS = {"latent_perplexity": np.exp}
"""What makes a metric of its mean, where it is not the mean itself."""

ACTIONS = {
    "none": "no actions",
    "constant": "no actions",
    "planner": "the planner's actions",
    "true": "true actions",
}
"""Whose actions a text is conditioned on, as progress tells it."""

KEYS = ["variant", "actions", "texts", "length", "metric"]
"""What tells a row of the results from the others."""


@dataclass(frozen=True)
class GenerationEvaluation:
    """What was found of generated text.

    Attributes:
        metrics: One row for each variant, source of actions, kind of texts (continuations, samples), length
            and metric: `value` over all seeds with a 95 % interval from resampling documents (`value_low`,
            `value_high`), `seed_spread`, the standard deviation of the seeds' own values, and how many of the
            texts were `empty`. Variant "true" is true text in generated text's place, "other document" the
            true continuation of another document.
        values: What they are made of, MAUVE aside, by seed and document: `sum` and `count`. Samples have a
            number for a document.
        settings: How it was measured.
        notes: What could not be measured as asked.
    """

    metrics: pd.DataFrame
    values: pd.DataFrame
    settings: dict[str, Any]
    notes: list[str]


def evaluate_generation(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> GenerationEvaluation:
    """Generates text with every variant and measures it; writes `generation.json` and `generation.parquet`.

    Args:
        run: The run or its folder.
        settings: Settings to replace for this evaluation, by dotted name, such as `generation.lengths`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run lacks a stage, or test documents that are long enough.
    """
    run = Run.at(run, settings)
    if run.config.method == "planner":
        run.require("planner")
    progress = Progress(quiet=quiet)
    with progress.task("label true texts"):
        true = TrueTexts.of(run)
    mauve = _Mauve(run, true.samples, progress)
    values = [
        frame.assign(variant=name, actions="true", seed=_seeds(run)[0]) for name, frame in true.references()
    ]
    rows = mauve.reference()
    for variant, actions, _ in variants_and_actions(run):
        measured, samples = _measured(run, variant, actions, true, progress)
        values += measured
        rows += mauve.row(variant, actions, samples)
    table = pd.concat(values, ignore_index=True)
    metrics = pd.concat([_metrics(run, table), pd.DataFrame(rows)], ignore_index=True)
    evaluation = GenerationEvaluation(
        metrics, table, _how(run, true), [*_few_prompts(run, true), *mauve.notes]
    )
    _write(run, evaluation)
    return evaluation


def check_generation(run: Run | str | Path, settings: Mapping[str, Any] | None = None) -> None:
    """Refuses what `evaluate_generation` would refuse for want of something, before work begins.

    Raises:
        ProbekitError: Fewer than two test documents are long enough, or the corpus's encoder is gone.
    """
    run = Run.at(run, settings)
    continued_documents(run)
    check_encoder(run.folder / "corpus" / "encoder")


def _measured(
    run: Run, variant: Any, actions: str, true: TrueTexts, progress: Progress
) -> tuple[list[pd.DataFrame], list[Tokens]]:
    """Values of all that a variant writes, and its samples `[seeds]`; none where it needs true actions."""
    nothing = [Prompt(np.array([run.corpus.separator]), "")] * run.config.generation.samples
    values: list[pd.DataFrame] = []
    samples: list[Tokens] = []
    for seed in _seeds(run):

        def texts(what: str, prompts: Sequence[Prompt], seed: int = seed) -> list[Generated]:
            plan: Plan = "given" if actions == "true" else "planner"
            return generate(
                run,
                prompts,
                variant=variant,
                tokens=true.longest,
                plan=plan,
                seed=seed,
                progress=progress,
                title=f"{what} ({variant}, {ACTIONS[actions]})",
            )

        row = {"variant": variant, "actions": actions, "seed": seed}
        continued = texts("continuations", true.prompts)
        tokens, plans = [text.tokens for text in continued], [text.plan for text in continued]
        values.append(true.continuation_values(tokens, plans).assign(**row))
        if actions != "true":  # what begins with nothing has no true plan
            samples.append([text.tokens for text in texts("samples", nothing)])
            values.append(true.sample_values(samples[-1]).assign(**row))
    return values, samples


class _Mauve:
    """MAUVE of samples against the beginnings of test documents, as many of one as of the other.

    Attributes:
        notes: What could not be measured.
    """

    def __init__(self, run: Run, true: Tokens, progress: Progress) -> None:
        self.notes: list[str] = []
        self._run, self._progress = run, progress
        self._size = min(len(true), run.config.generation.samples)
        self._length = max(run.config.generation.lengths)
        if self._size < LEAST_TEXTS:
            self.notes.append(
                f"No MAUVE: it needs {LEAST_TEXTS} texts of {self._length:,} tokens on either side, and "
                f"{len(true):,} test documents are that long, of generation.samples "
                f"{run.config.generation.samples:,}; lower generation.lengths, or raise what is too low"
            )
            return
        if self._size < FEW_TEXTS:
            self.notes.append(
                f"MAUVE of {self._size:,} texts on either side does not tell variants apart; it takes "
                f"{FEW_TEXTS}: generation.samples, and as many test documents that are long enough"
            )
        self._true = self._features("test documents", true)

    def row(self, variant: str, actions: str, samples: Sequence[Tokens]) -> list[dict[str, Any]]:
        """The row of a variant's samples `[seeds]`; none where there are too few, or none."""
        if self._size < LEAST_TEXTS or not samples:
            return []
        seed = self._run.config.seed
        clustered = [
            cluster_texts(self._features(f"texts ({variant})", texts), self._true, seed) for texts in samples
        ]
        interval = mauve_interval(clustered, resamples=self._run.config.evaluation.resamples, seed=seed)
        keys = (variant, actions, "samples", self._length, "mauve")
        each = [one.mauve for one in clustered]
        found = {
            "value": interval.value,
            "value_low": interval.low,
            "value_high": interval.high,
            "seed_spread": float(np.std(each, ddof=1)) if len(each) > 1 else np.nan,
            "seeds": len(each),
            "documents": interval.documents,
            "empty": sum(not len(ids) for texts in samples for ids in texts[: self._size]),
        }
        return [dict(zip(KEYS, keys, strict=True)) | found]

    def reference(self) -> list[dict[str, Any]]:
        """The row of other true texts, from the split `probe`, which no training has seen either."""
        _, other = beginnings(self._run, "probe")
        if self._size >= LEAST_TEXTS and len(other) < self._size:
            self.notes.append(
                f"No MAUVE of true text: it needs {self._size:,} documents of {self._length:,} tokens in the "
                f"split probe, and there are {len(other):,}"
            )
            return []
        return self.row("true", "true", [other])

    def _features(self, name: str, texts: Tokens) -> np.ndarray:
        window, _ = window_and_stride(self._run)
        with self._progress.task(f"features of {name}", total=self._size) as task:
            return text_features(self._run, texts[: self._size], window, task)


def _metrics(run: Run, values: pd.DataFrame) -> pd.DataFrame:
    """Values over seeds and documents."""
    rows = over_seeds(
        values, KEYS, TRANSFORMS, resamples=run.config.evaluation.resamples, seed=run.config.seed
    )
    empty = values.groupby(KEYS)["empty"].sum().reset_index()
    return rows[rows.seed.isna()].drop(columns="seed").merge(empty, on=KEYS)


def _seeds(run: Run) -> tuple[int, ...]:
    return run.config.generation.seeds or (run.config.seed,)


def _how(run: Run, true: TrueTexts) -> dict[str, Any]:
    return run.config.generation.model_dump(mode="json") | {
        "split": "test",
        "prompts": len(true.prompts),
        "true_samples": len(true.samples),
        "seeds": list(_seeds(run)),
        "resamples": run.config.evaluation.resamples,
        "rouge2": "F-measure, no stemming",
        "labels": "nearest centroid",
        "features": FEATURES,
    }


def _few_prompts(run: Run, true: TrueTexts) -> list[str]:
    wanted, found = run.config.generation.prompts, len(true.prompts)
    if found == wanted:
        return []
    return [f"{found:,} prompts in place of {wanted:,}: no more test documents are long enough"]


def _write(run: Run, evaluation: GenerationEvaluation) -> None:
    # What does not exist is null: JSON knows no NaN.
    rows = evaluation.metrics.astype(object).replace({np.nan: None}).to_dict(orient="records")
    write_table(run.folder / "generation.parquet", evaluation.values)
    write_json(
        run.folder / "generation.json",
        {"settings": evaluation.settings, "notes": evaluation.notes, "metrics": rows},
    )
