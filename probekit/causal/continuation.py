"""`probekit continuation`: what the LM writes on after one activation alone (ParaScopes, arXiv 2511.00180).

The residual stream of the last token before a sentence is put into a context that holds nothing but this
token, and the LM writes on. If what it writes resembles the true next sentences more than what it writes
after the activation of another document, that activation held something of them. Nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit import distributed
from probekit.causal.boundaries import draw_boundaries
from probekit.causal.intervene import metric_rows
from probekit.causal.variant_lm import SumsByMetric, write_results
from probekit.data.encoders import WORD, SentenceEncoder
from probekit.data.sentences import sentence_spans
from probekit.data.special_tokens import drawable_ids
from probekit.data.tokenizer import decoded
from probekit.errors import ProbekitError
from probekit.generation.generate import draw, reading_window, without_others
from probekit.generation.metrics import rouge2
from probekit.models.backends import Hook
from probekit.models.conditioning import Conditioned
from probekit.models.decoding import GrowingText, MoreHooks, new_decoder
from probekit.models.locations import at_layers, hook_name
from probekit.models.planner import TrainableEncoder
from probekit.planted.ceilings import has_ceiling, position_ceiling
from probekit.probing.activations import ActivationReader
from probekit.probing.record import read_probe_record
from probekit.probing.results import Cell, SavedProbes
from probekit.probing.targets import NO_LABEL, TARGETS, find_examples
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import Resampling

LOCATION = "hook_resid_post"
"""What is put into the empty context: the residual stream after a block."""

CONTROLS = {"nothing": "nothing", "other document": "other", "ridge map": "ridge", "context": "context"}
"""What the activation is compared with on the same boundaries, and the names of these comparisons."""

TYPES = {"layer": "Int64"}
"""Types of columns that may be empty."""


@dataclass(frozen=True)
class ContinuationResults:
    """How much of the next sentences the LM writes after one activation alone.

    Attributes:
        table: One row for each condition, layer, horizon and metric, with its 95 % interval from resampling
            documents, one sentence boundary each. Conditions: `activation` and `other document`, by layer
            and with all layers together (no layer); `nothing`, the token alone; `context`, all that stands
            before; `ridge map`, if the target `embedding` was probed; `ceiling` of the planted corpus.
            Metrics compare the written sentence so many ahead with the true one: `cosine` of embeddings,
            less the mean of the training documents; `true_action`, the share with the true one's; `rouge2`.
            `cosine_over_other` and the like are paired differences of `activation` from a control.
        written: The written sentences: a row for each boundary, condition, layer and horizon.
        folder: Where it was written.
        notes: Remarks on all rows together.
    """

    table: pd.DataFrame
    written: pd.DataFrame
    folder: Path
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ahead:
    """The sentences after some boundaries, and how near others are to them.

    Attributes:
        run: The run.
        sentence: The next sentence of each boundary `[boundaries]`.
        horizons: Sentences ahead, 1 for the next one.
        encoder: Embeds sentences as the corpus's own are.
        centre: The mean embedding of the training documents' sentences `[dimensions]`.
    """

    run: Run
    sentence: np.ndarray
    horizons: tuple[int, ...]
    encoder: SentenceEncoder | TrainableEncoder
    centre: np.ndarray

    @classmethod
    def of(cls, run: Run, sentence: np.ndarray) -> Ahead:
        """Those of a run, under its settings `continuation`."""
        corpus = run.corpus
        train = corpus.sentences(corpus.documents("train"))
        centre = corpus.embeddings[train].mean(0, dtype=np.float64)
        return cls(run, sentence, run.config.continuation.horizons, run.encoder(), centre)

    def of_texts(self, texts: Sequence[Sequence[str]]) -> dict[int, SumsByMetric]:
        """Metrics by horizon of written sentences `[boundaries][sentences]`; too few count as unlike."""
        found: dict[int, SumsByMetric] = {}
        for horizon in self.horizons:
            own = [sentences[horizon - 1] if len(sentences) >= horizon else "" for sentences in texts]
            true = self.run.corpus.sentence_texts(self.sentence + horizon - 1)
            rouge = np.array([rouge2(*pair) for pair in zip(true, own, strict=True)])
            embeddings = np.where([[bool(text)] for text in own], self.encoder.encode(own), 0.0)
            found[horizon] = self.of_embeddings(embeddings, horizon)
            found[horizon]["rouge2"] = (rouge, np.ones(len(rouge)))
        return found

    def of_embeddings(self, embeddings: np.ndarray, horizon: int) -> SumsByMetric:
        """Metrics of embeddings `[boundaries, dimensions]`; zeros, of no known word, count as unlike."""
        corpus, true = self.run.corpus, self.sentence + horizon - 1
        known = embeddings.any(axis=1) & corpus.with_action[true]
        first, second = (
            part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
            for part in (embeddings - self.centre, corpus.embeddings[true] - self.centre)
        )
        cosine = np.where(known, (first * second).sum(1), 0.0)
        hit = known & (corpus.codebook.nearest(embeddings) == corpus.actions[true])
        one = np.ones(len(true))
        return {"cosine": (cosine, one), "true_action": (hit.astype(float), one)}


def continuation(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> ContinuationResults:
    """Has the LM write on after single activations; writes `continuation/`, in place of earlier results.

    Args:
        run: The run or its folder; a corpus with actions and an LM are enough.
        settings: Settings to replace, by dotted name, such as `continuation.layers`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run lacks a stage, or a setting does not fit the LM or the corpus.
    """
    distributed.check_alone("continuation")
    run = Run.at(run, settings)
    run.check_writable()
    run.require_causal()
    run.corpus.require_actions()
    chosen, config, progress = run.config.continuation, run.config, Progress(quiet=quiet)
    points = at_layers([LOCATION], chosen.layers, run.frozen_lm().layers, "continuation.layers")
    # In a window that has moved, another token would stand where the activation is put. The last token that
    # is written is not read.
    if chosen.tokens > (most := reading_window(run) - 1):
        raise ProbekitError(
            f"continuation.tokens is {chosen.tokens:,}, but the LM reads {most + 1:,} tokens at once, the "
            f"two before them included; give at most {most:,}"
        )
    layers = [layer for _, layer in points]
    sentence = _drawn(run)
    ahead, writer = Ahead.of(run, sentence), _Writer(run, sentence)
    donors = _donors(len(sentence), config.seed)
    with progress.task("read the activations before sentences"):
        states = _activations(run, sentence)
    every = {hook_name(LOCATION, layer): values for layer, values in states.items()}
    given = {layer: {hook_name(LOCATION, layer): states[layer]} for layer in layers} | {None: every}
    texts: dict[tuple[str, int | None], list[list[str]]] = {}
    with progress.task("write", total=2 + 2 * len(given)) as task:
        texts["context", None] = writer.write(writer.contexts())
        task.advance(note="with the context")
        texts["nothing", None] = writer.write(writer.empty)
        task.advance(note="with nothing")
        for layer, values in given.items():
            donated = {name: activations[donors] for name, activations in values.items()}
            for name, put in (("activation", values), ("other document", donated)):
                texts[name, layer] = writer.write(writer.empty, put)
                task.advance(note=f"{name}, {'all layers' if layer is None else f'layer {layer}'}")
    with progress.task("compare with the true sentences"):
        found = {key: ahead.of_texts(own) for key, own in texts.items()}
    notes = []
    if maps := _ridge_maps(run, states, layers, ahead):
        found |= maps
    else:
        notes = [
            f"no ridge map beside: `probekit probe {run.folder} --target embedding --positions 1` fits it"
        ]
    resampling = config.resampling
    table = pd.DataFrame(_rows(found, _ceiling(run, ahead), resampling)).astype(TYPES)
    if len(sentence) < chosen.boundaries:
        notes.append(
            f"{len(sentence):,} sentence boundaries, for no more test documents have one; "
            f"continuation.boundaries asks for {chosen.boundaries:,}"
        )
    results = ContinuationResults(table, _written(run, sentence, texts), run.folder / "continuation", notes)
    write_results(results.folder, {"results": table, "written": results.written}, run, notes)
    return results


def _drawn(run: Run) -> np.ndarray:
    """The next sentence of one boundary of each test document, with others behind it."""
    corpus, chosen = run.corpus, run.config.continuation
    documents, last = corpus.documents("test"), np.zeros(len(corpus.actions), bool)
    ends = corpus.document_sentences[1:]
    for back in range(1, max(chosen.horizons)):
        last[np.maximum(ends - back, 0)] = True
    labels = np.where(last, NO_LABEL, corpus.known_actions)
    lengths = corpus.document_sentences[documents + 1] - corpus.document_sentences[documents]
    if (lengths <= max(chosen.horizons)).all():
        raise ProbekitError(
            f"continuation.horizons has {max(chosen.horizons)}, but no test document has so many sentences "
            "after its first one; give fewer"
        )
    window = reading_window(run)
    drawn = draw_boundaries(
        *(corpus, labels, documents, chosen.boundaries, window, 1, run.config.seed),
        setting="continuation.horizons",
    )
    if len(drawn) == 1:
        raise ProbekitError(
            "only one test document has a sentence boundary to write on after, so no other document's "
            "activation can stand beside its own; give more documents, or lower continuation.horizons"
        )
    return drawn.sentence


def _donors(count: int, seed: int) -> Tensor:
    """For each boundary another one, whose activation it is given: each gives once, one cycle through all."""
    order = np.random.default_rng([seed, count]).permutation(count)
    donors = np.empty_like(order)
    donors[order] = np.roll(order, 1)
    return torch.from_numpy(donors)


def _activations(run: Run, sentence: np.ndarray) -> dict[int, Tensor]:
    """By layer, the residual stream of the token before each sentence `[boundaries, width]`."""
    corpus, layers = run.corpus, range(run.frozen_lm().layers)
    order = np.argsort(sentence)
    documents = corpus.document_of(sentence[order])
    examples = find_examples(corpus, documents, TARGETS["action"](corpus), (1,))
    examples = examples[np.flatnonzero(np.isin(examples.sentence, sentence))]
    reader = ActivationReader(run, "none", [(LOCATION, layer) for layer in layers], (1,))
    (values,) = reader.read(examples)
    return dict(zip(layers, values[:, 0, np.argsort(order)], strict=True))


class _Writer:
    """Writes on after some tokens; what is drawn for a boundary depends on the seed and its number alone.

    Args:
        run: The run, whose settings `generation` say how tokens are drawn.
        sentence: The next sentence of each boundary.

    Attributes:
        empty: The tokens of contexts that hold the last one before each sentence alone. The separator before
            it is read by all LMs: they attend to the first token whatever it is.
    """

    def __init__(self, run: Run, sentence: np.ndarray) -> None:
        corpus = run.corpus
        self._run, self._sentence = run, sentence
        self._last = corpus.first_token[sentence] - 1
        names = [hook_name(LOCATION, layer) for layer in range(run.frozen_lm().layers)]
        model = run.model("none", names)
        self._decoder = new_decoder(model, model.backend, reading_window(run), corpus.bos_rule)
        self._drawable = torch.from_numpy(drawable_ids(corpus.tokenizer)).to(run.device)
        # An LM that reads no separator does not read the first of two.
        before = [corpus.separator] * (1 + (corpus.bos_rule == "none"))
        self.empty = [[*before, int(corpus.tokens[at])] for at in self._last]

    def contexts(self) -> list[list[int]]:
        """The tokens of the documents up to each sentence, the separator first."""
        corpus = self._run.corpus
        begins = corpus.document_tokens[corpus.document_of(self._sentence)]
        return [
            corpus.tokens[begin : end + 1].tolist() for begin, end in zip(begins, self._last, strict=True)
        ]

    @torch.no_grad()
    def write(
        self, contexts: Sequence[Sequence[int]], put: Mapping[str, Tensor] | None = None
    ) -> list[list[str]]:
        """The sentences that the LM writes after each context `[boundaries][sentences]`.

        Args:
            contexts: Tokens; those of one call are `empty` if activations are put there.
            put: By full hook name, what stands in place of the last token's own activation
                `[boundaries, width]`.
        """
        config, tokenizer = self._run.config, self._run.corpus.tokenizer
        order = np.argsort([len(context) for context in contexts], kind="stable")
        found: dict[int, list[str]] = {}
        for start in range(0, len(order), config.evaluation.batch_size):
            rows = order[start : start + config.evaluation.batch_size].tolist()
            texts = [GrowingText([*contexts[row]], [0] * len(contexts[row]), []) for row in rows]
            uniforms = np.stack(
                [np.random.default_rng([config.seed, row]).random(config.continuation.tokens) for row in rows]
            )
            more = None if put is None else _putting({name: values[rows] for name, values in put.items()})
            for drawn in torch.from_numpy(uniforms.T):
                with self._run.autocast():
                    logits = self._decoder(texts, more).float()
                allowed = without_others(logits, self._drawable)
                tokens = draw(allowed, drawn.to(logits.device), config.generation).tolist()
                for text, token in zip(texts, tokens, strict=True):
                    text.tokens.append(token)
                    text.carried.append(0)
            for row, text in zip(rows, texts, strict=True):
                written = decoded(tokenizer, text.tokens[len(contexts[row]) :])
                found[row] = _sentences(written, config.corpus.language)
        return [found[row] for row in range(len(contexts))]


def _putting(values: Mapping[str, Tensor]) -> MoreHooks:
    """Hooks that put activations `[texts, width]` in place of those of the second token that is read."""

    def hooks(read: Conditioned) -> list[Hook]:
        return [(name, _put(activations)) for name, activations in values.items()]

    def _put(activations: Tensor) -> Any:
        def change(activation: Tensor, hook: object = None) -> Tensor:
            changed = activation.clone()
            changed[:, 1] = activations.to(changed)
            return changed

        return change

    return hooks


def _sentences(text: str, language: str) -> list[str]:
    """The sentences of a written text; the last one may be cut off."""
    spans = sentence_spans(text, language)
    return [text[start:end].strip() for start, end in spans if WORD.search(text[start:end])]


def _ridge_maps(
    run: Run, states: Mapping[int, Tensor], layers: Sequence[int], ahead: Ahead
) -> dict[tuple[str, int | None], dict[int, SumsByMetric]]:
    """Metrics of the embeddings that the run's probes of the target `embedding` predict, by layer."""
    if not (run.folder / "probes").is_dir():
        return {}
    probed = read_probe_record(run.folder).config
    chosen = probed.probe
    # A table of labels may have a column of that name, and at every token other activations are read.
    of_sentences = chosen.target == "embedding" and chosen.labels is None and chosen.anchors == "start"
    if not of_sentences or "none" not in chosen.variants:
        return {}
    seed, *_ = chosen.seeds or (probed.seed,)
    saved = SavedProbes(run.folder / "probes", "none", seed)
    found: dict[tuple[str, int | None], dict[int, SumsByMetric]] = {}
    for layer in layers:
        cells = {horizon: Cell(LOCATION, layer, 1, horizon, "ridge") for horizon in ahead.horizons}
        own = {
            horizon: ahead.of_embeddings(saved[cell].scores(states[layer].cpu()).numpy(), horizon)
            for horizon, cell in cells.items()
            if cell in saved.cells
        }
        found |= {("ridge map", layer): own} if own else {}
    return found


def _ceiling(run: Run, ahead: Ahead) -> dict[int, SumsByMetric]:
    """By horizon, how often the best possible prediction from all tokens before is the true action."""
    if not has_ceiling(run.config):
        return {}
    corpus, found = run.corpus, dict[int, SumsByMetric]()
    positions = corpus.first_token[ahead.sentence] - 1
    for horizon in ahead.horizons:
        true = ahead.sentence + horizon - 1
        best = position_ceiling(run.config, corpus, positions, true).argmax(axis=1)
        found[horizon] = {"true_action": ((best == corpus.actions[true]).astype(float), np.ones(len(true)))}
    return found


def _rows(
    found: Mapping[tuple[str, int | None], Mapping[int, SumsByMetric]],
    ceiling: Mapping[int, SumsByMetric],
    resampling: Resampling,
) -> list[dict[str, Any]]:
    """A row for each condition, layer, horizon and metric, paired differences of `activation` among them."""
    rows: list[dict[str, Any]] = []
    for (condition, layer), by_horizon in [*found.items(), (("ceiling", None), ceiling)]:
        for horizon, own in by_horizon.items():
            sums = dict(own)
            for control, called in CONTROLS.items() if condition == "activation" else ():
                beside = found.get((control, layer), found.get((control, None), {})).get(horizon, {})
                for metric, (values, counts) in beside.items():
                    sums[f"{metric}_over_{called}"] = (own[metric][0] - values, counts)
            head = {"condition": condition, "layer": layer, "horizon": horizon}
            rows += metric_rows(head, sums, None, resampling)
    return rows


def _written(
    run: Run, sentence: np.ndarray, texts: Mapping[tuple[str, int | None], list[list[str]]]
) -> pd.DataFrame:
    """The written sentences beside the true ones."""
    horizons, documents = run.config.continuation.horizons, run.corpus.document_of(sentence)
    parts = [
        {
            "document": documents,
            "sentence": sentence + horizon - 1,
            "condition": condition,
            "layer": layer,
            "horizon": horizon,
            "written": [own[horizon - 1] if len(own) >= horizon else "" for own in written],
            "true": run.corpus.sentence_texts(sentence + horizon - 1),
        }
        for (condition, layer), written in texts.items()
        for horizon in horizons
    ]
    return pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True).astype(TYPES)
