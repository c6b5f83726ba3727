"""What the lens shows, as numbers: a text cut like the run's corpus, and what the run's probes read of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.config import Config, ProbedName, VariantName, user_path
from probekit.data.codebook import nearest_sentences
from probekit.data.corpus import SPLITS, Corpus, too_few
from probekit.data.sentences import align, complete_spans, sentence_spans
from probekit.errors import ProbekitError
from probekit.models.conditioning import CONDITIONINGS
from probekit.models.locations import label, per_layer
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import HookPoint, Reader
from probekit.probing.results import LINEAR_SOLVERS, Cell, LinearProbe, SavedProbes, read_probe_record
from probekit.probing.targets import Examples
from probekit.progress import Progress, Task
from probekit.run.run import Run

LIMIT = 2000
"""Default for the largest number of tokens of a text."""

BASELINES = ("prior", "bigram", "planner")
"""Baselines shown beside a probe's accuracy."""

PLANNED = 5
"""How many of the planner's most probable actions are shown."""

EXAMPLES = 3
"""Sentences that illustrate an action; fewer where they have the same text."""

NONE = -1
"""The action of a sentence that has none."""


# The text


def given_text(given: str | Path) -> str:
    """Returns the text that the user means: that of a file, or the string itself.

    Whatever exists is read. A `Path`, or a string without white space that contains a slash or ends in .txt
    or .md, is the name of a file; any other string is the text.

    Raises:
        ProbekitError: The file does not exist, is a folder or is not UTF-8; or the text is not valid Unicode.
    """
    if isinstance(given, str) and any("\ud800" <= character <= "\udc7f" for character in given):
        raise ProbekitError("--text is not valid Unicode; give it as UTF-8")
    names_nothing = "\0" in str(given)
    path = Path(str(given)) if names_nothing else user_path(given)
    try:
        exists = bool(str(given).strip()) and path.exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        exists = False
    one_word = str(given).split() == [str(given)]
    looks_like_file = one_word and not names_nothing and ("/" in str(given) or path.suffix in (".txt", ".md"))
    if not (exists or isinstance(given, Path) or looks_like_file):
        try:
            str(given).encode()
        except UnicodeEncodeError:
            raise ProbekitError("--text is not valid Unicode; give it as UTF-8") from None
        return str(given)
    try:
        # Line ends unchanged and no byte order mark, as the corpus's own files are read.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProbekitError(
            f"--text {path}: is not UTF-8 (byte {error.start:,}); convert it, or give another file"
        ) from None
    except FileNotFoundError:
        raise ProbekitError(
            f"--text {path}: does not exist; give a file, or a text of several words"
        ) from None
    except OSError as error:
        raise ProbekitError(f"--text {path}: cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class Text:
    """A text, cut into tokens and sentences as a run's corpus was.

    Attributes:
        corpus: A corpus with this text as its only document: separator, tokens, and one more token, so that
            the LM reads the last token too. If the last sentence is complete, that token begins one more
            sentence, with an embedding of zeros and action 0, which nothing before it can see.
        pieces: The text that each token adds; joined they are the text `[tokens]`.
        first_token: Each sentence's first token `[sentences]`.
        document: The number of the same document in the run's corpus; None if it is no document of it.
        actions: True actions: those of the corpus's document, else the nearest centroids `[sentences]`.
        known: Whether a sentence has a word that the encoder knows; if not, its nearest centroid means
            nothing `[sentences]`.
        embeddings: By the encoder of the corpus, or the variant's own `[sentences, dimensions]`.
    """

    corpus: Corpus
    pieces: list[str]
    first_token: np.ndarray
    document: int | None
    actions: np.ndarray
    known: np.ndarray
    embeddings: np.ndarray

    @property
    def complete(self) -> bool:
        """Whether the last sentence is complete, so that the next token would begin another."""
        return len(self.corpus.first_token) > len(self.first_token)


class TextRun(Run):
    """A run whose corpus is one text; it shares the models that another run has loaded."""

    def __init__(self, run: Run, text: Text) -> None:
        super().__init__(run.folder, run.config)
        vars(self).update(vars(run))
        self.corpus = text.corpus

    def corpus_of(self, variant: VariantName) -> Corpus:
        """Returns the text, which already has the variant's embeddings."""
        return self.corpus


def cut_text(run: Run, text: str, variant: VariantName, limit: int = LIMIT) -> Text:
    """Cuts a text into tokens and sentences, and assigns actions to the sentences.

    Special tokens in the text are read as ordinary text.

    Args:
        run: The run whose tokenizer, encoder and codebook are used.
        text: The text.
        variant: The variant whose planner will read it.
        limit: The largest number of tokens.

    Raises:
        ProbekitError: The text is blank or has too many tokens.
    """
    language, corpus = run.config.corpus.language, run.corpus
    spans = sentence_spans(text, language)
    if not len(spans):
        raise ProbekitError("--text is blank: it has no sentence to read")
    encoded = corpus.tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids, offsets = encoded["input_ids"], np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    if len(ids) > limit:
        raise ProbekitError(
            f"--text has {len(ids):,} tokens, more than --limit {limit:,}; shorten it, or raise that"
        )
    aligned = align(text, spans, offsets)
    sentences = [text[start:end].strip() for start, end in aligned.spans]
    encodings = run.encoder().encode(sentences)
    own_encoder = run.corpus_of(variant) is not corpus
    embeddings = run.encoder(variant).encode(sentences) if own_encoder else encodings

    document = _document_of(corpus, np.array(ids), aligned.first_token)
    if document is None:
        actions = corpus.codebook.nearest(encodings)
    else:  # planted actions are not always those of the nearest centroids
        actions = np.array(corpus.actions[slice(*corpus.document_sentences[document : document + 2])])

    more = int(len(complete_spans(text, language)) == len(spans))
    tokens = np.array([corpus.separator, *ids, corpus.separator])
    first = aligned.first_token + 1
    alone = replace(
        corpus,
        tokens=tokens,
        document_tokens=np.array([0, len(tokens)]),
        document_sentences=np.array([0, len(first) + more]),
        first_token=np.append(first, [len(tokens) - 1] * more),
        spans=np.concatenate([aligned.spans, np.full((more, 2), len(text))]),
        split=np.array([SPLITS.index("test")], np.uint8),
        embeddings=np.pad(embeddings, ((0, more), (0, 0))),
        actions=np.pad(actions, (0, more)),
        facts={"bos": corpus.bos_rule},
    )
    # Characters that the tokenizer leaves out go with the token after them.
    ends = np.maximum.accumulate(offsets[:, 1])
    ends[-1] = len(text)
    pieces = [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    known = np.any(encodings != 0, axis=1)
    return Text(alone, pieces, aligned.first_token, document, actions.astype(np.int64), known, embeddings)


def _document_of(corpus: Corpus, ids: np.ndarray, first_token: np.ndarray) -> int | None:
    """The first document of a corpus with these tokens and sentences."""
    for document in np.flatnonzero(np.diff(corpus.document_tokens) == len(ids) + 1).tolist():
        start, end = corpus.document_tokens[document : document + 2]
        own = slice(*corpus.document_sentences[document : document + 2])
        same_tokens = np.array_equal(corpus.tokens[start + 1 : end], ids)
        if same_tokens and np.array_equal(corpus.first_token[own] - start - 1, first_token):
            return document
    return None


# The probes


@dataclass(frozen=True)
class KeptProbes:
    """A run's linear probes for the next sentence's action, of one variant, seed and solver.

    Attributes:
        variant: Whose activations they read.
        seed: Seed of the documents drawn to fit on.
        solver: How they were fitted.
        points: Locations and layers, those of a location together.
        distances: Tokens before the sentence begins, ascending; every point has all of them.
        config: The settings that they were fitted with.
        documents: How many documents they were fitted, selected and tested on.
        quality: Their rows of the table of results, in the order of the cells.
        baselines: Rows of baselines by name, in the order of the distances.
        best: Number of the cell that is best on validation documents, among those that are not injected.
        saved: Their weights.
    """

    variant: ProbedName
    seed: int
    solver: str
    points: list[HookPoint]
    distances: list[int]
    config: Config
    documents: Mapping[str, int]
    quality: pd.DataFrame
    baselines: dict[str, pd.DataFrame]
    best: int
    saved: SavedProbes

    def at(self, point: HookPoint) -> LinearProbe:
        """Returns the probes of a point for all distances: `coef` `[distances, width, actions]`."""
        return self.saved.stacked([Cell(*point, distance, 1, self.solver) for distance in self.distances])


def kept_probes(
    run: Run,
    variant: str | None = None,
    locations: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> KeptProbes:
    """Finds the probes of a run that the lens reads with: those for the next sentence, of the first seed.

    Args:
        run: The run.
        variant: Whose; None: the first that was probed.
        locations: Only these.
        layers: Only these, at locations that every layer has.

    Raises:
        ProbekitError: The run has no such probes; the message names the command that makes them.
    """
    folder = run.folder / "probes"
    seeds: dict[str, int] = {}
    for path in folder.glob("*-seed*.safetensors"):
        name, _, number = path.stem.rpartition("-seed")
        seeds[name] = min(int(number), seeds.get(name, int(number)))
    if not seeds:
        raise ProbekitError(f"{run.folder} keeps no linear probes; run `probekit probe {run.folder}`")
    record = read_probe_record(run.folder)
    probed = record.config.probe
    if (probed.target, probed.labels, probed.anchors) != ("action", None, "start"):
        raise ProbekitError(
            f"the probes of {run.folder} read {probed.target!r} (probe.anchors {probed.anchors}), but the "
            f"lens shows the next sentence's action; `probekit score {run.folder} TEXTS --tokens` shows what "
            "they read, token by token"
        )
    known = [name for name in probed.variants if name in seeds]
    variant = known[0] if variant is None else variant
    if not isinstance(variant, str) or variant not in known:
        raise ProbekitError(
            f"--variant is {variant!r}, of which {folder} keeps no linear probes; it has {', '.join(known)}; "
            f"for others run `probekit probe {run.folder} --probe.variants ...`"
        )
    saved, seed = SavedProbes(folder, variant, seeds[variant]), seeds[variant]
    before = {cell: cell.position for cell in saved.cells if cell.horizon == 1}
    cells = {cell: d for cell, d in before.items() if isinstance(d, int) and d > 0}
    solver = next((solver for solver in LINEAR_SOLVERS if solver in {cell.solver for cell in cells}), None)
    if solver is None:
        raise ProbekitError(
            f"the probes in {folder} have none of horizon 1 that reads before a sentence; run "
            f"`probekit probe {run.folder} --probe.horizons 1 --probe.positions 1`"
        )

    found = sorted({(cell.location, cell.layer) for cell in cells})
    for option, asked, there in (
        ("--locations", locations, sorted({location for location, _ in found})),
        ("--layers", layers, sorted({layer for _, layer in found})),
    ):
        for value in () if asked is None else asked:
            if value not in there:
                known_ones = ", ".join(map(str, there))
                raise ProbekitError(f"{option} has {value!r}, where no probe reads; there are {known_ones}")
    points = [
        (location, layer)
        for each in dict.fromkeys([*probed.locations, *(location for location, _ in found)])
        for location, layer in found
        if location == each and (locations is None or location in locations)
        if layers is None or layer in layers or not per_layer(location)
    ]
    if not points:
        raise ProbekitError("--locations and --layers together leave no point that a probe reads; give one")

    distances = sorted({*cells.values()})
    names = [str(distance) for distance in distances]
    rows = run.probes().query("horizon == 1")
    own = rows.query("reader == 'probe' and variant == @variant and solver == @solver and seed == @seed")
    own = own.set_index(["location", "layer", "position"])
    own = own.loc[[(*point, name) for point in points for name in names]]
    free = own.validation_cross_entropy.where(~own.injected).fillna(float("inf")).to_numpy()
    baselines = {
        name: baseline.set_index("position").loc[names]
        for name in BASELINES
        if len(baseline := rows[rows.reader == name])
    }
    return KeptProbes(
        variant,
        seed,
        solver,
        points,
        distances,
        record.config,
        record.documents[str(seed)],
        own,
        baselines,
        int(free.argmin()),
        saved,
    )


# Reading the text with the probes


@dataclass(frozen=True)
class LensData:
    """What the lens shows of a text.

    Cells are numbered point by point and, within a point, distance by distance. Sentence number `sentences`
    is the one after the text, of which nothing is known.

    Attributes:
        facts: What was read with what, in words.
        language: Of the text.
        probes: The probes.
        labels: Short name of each point's location.
        pieces: The text that each token adds `[tokens]`.
        first_token: Each sentence's first token `[sentences]`.
        truth: Where true actions are from, in a sentence.
        actions: True actions, -1 where the encoder knows none of a sentence's words `[sentences]`.
        complete: Whether the last sentence is complete.
        top: The most probable action `[cells, tokens]`.
        probability: Its probability `[cells, tokens]`.
        true_probability: That of the next sentence's true action; NaN where no sentence follows
            `[cells, tokens]`.
        planner: The planner's forecast of every sentence from those before it, or None: `top` and
            `probability`, the most probable actions `[sentences + 1, PLANNED]`, and `true`, the probability
            of the true action `[sentences]`.
        conditioning: What the LM was conditioned on, or None: `action` and `weight`, the action with the
            largest weight in each sentence's mix `[sentences + 1]`; `carried`, the sentence whose plan the LM
            received last at each token `[tokens]`; `planned`, whether a planner chose it; `changed`, whether
            it changes the activation of each point at the token itself `[points]`.
        names: The name of each action that occurs.
        examples: The training sentences nearest to each of them.
        notes: What to know of the text.
    """

    facts: dict[str, str]
    language: str
    probes: KeptProbes
    labels: list[str]
    pieces: list[str]
    first_token: np.ndarray
    truth: str
    actions: np.ndarray
    complete: bool
    top: np.ndarray
    probability: np.ndarray
    true_probability: np.ndarray
    planner: dict[str, np.ndarray] | None
    conditioning: dict[str, Any] | None
    names: Mapping[int, str]
    examples: Mapping[int, list[str]]
    notes: list[str]


def read_text(
    run: Run,
    text: str,
    variant: str | None = None,
    *,
    locations: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    limit: int = LIMIT,
    progress: Progress | None = None,
) -> LensData:
    """Reads a text with a run's probes at every token.

    As in probing, each token is read in the window that scores the one after it.

    Args:
        run: The run.
        text: The text.
        variant: Whose activations; None: those of the first variant that was probed.
        locations: Read only these.
        layers: Read only these.
        limit: The largest number of tokens.
        progress: Where progress is shown.

    Raises:
        ProbekitError: The run has no such probes, or the text is blank or too long.
    """
    probes = kept_probes(run, variant, locations, layers)
    used = probes.config.probe.window
    run.require("lm")
    _ = run.locations  # loads the LM, which the caller's run keeps for the next text
    run = run.with_settings({"probe.window": used})
    progress = progress or Progress(quiet=True)
    # An LM with random weights is not conditioned, like the base LM.
    planned_for: VariantName = "none" if probes.variant == "random" else probes.variant
    with progress.task("cut the text"):
        cut = cut_text(run, text, planned_for, limit)
    alone = TextRun(run, cut)
    tokens = np.arange(len(cut.pieces))
    following = np.searchsorted(cut.first_token, tokens, side="right")
    actions = np.where(cut.known, cut.actions, NONE)
    reader = Reader(alone, probes.variant, probes.points, ["first"], probes.seed)
    with progress.task("read the text", total=len(tokens)) as task:
        top, probability, true_probability = _read(probes, reader, np.append(actions, NONE)[following], task)

    scores, planner = _planner_scores(alone, planned_for, cut), None
    if scores is not None:
        chances = scores.softmax(dim=-1)
        best = chances.sort(dim=-1, descending=True, stable=True)
        planner = {
            "top": best.indices[:, :PLANNED].numpy(),
            "probability": best.values[:, :PLANNED].numpy(),
            "true": chances[np.arange(len(cut.actions)), cut.actions].numpy(),
        }
    conditioning = _conditioning(alone, probes, reader, scores, cut)
    shown = [cut.actions, top, *([planner["top"]] if planner else [])]
    shown += [conditioning["action"]] if conditioning else []
    with progress.task("find the sentences nearest to the actions"):
        examples = _examples(run.corpus, np.unique(np.concatenate([np.ravel(part) for part in shown])))

    truth, notes = "A sentence's true action is the one whose centroid is nearest to it.", []
    if cut.document is not None:
        truth = (
            f"The text is document {cut.document:,} of the corpus, of the split "
            f"{SPLITS[run.corpus.split[cut.document]]!r}: true actions are those of the corpus."
        )
    if not cut.known.all():
        notes.append(
            f"{int((~cut.known).sum())} of {len(cut.known)} sentences have no word that the corpus's encoder "
            "knows: their actions mean nothing, and are not shown as true"
        )
    return LensData(
        facts=_facts(run, probes),
        language=run.config.corpus.language,
        probes=probes,
        labels=[label(location) for location, _ in probes.points],
        pieces=cut.pieces,
        first_token=cut.first_token,
        truth=truth,
        actions=actions,
        complete=cut.complete,
        top=top,
        probability=probability,
        true_probability=true_probability,
        planner=planner,
        conditioning=conditioning,
        names={action: run.corpus.action_name(action) for action in examples},
        examples=examples,
        notes=notes,
    )


def _read(
    probes: KeptProbes, reader: Reader, true: np.ndarray, task: Task
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every cell reads at every token, given the next sentence's true action `[tokens]`.

    Returns:
        The most probable action, its probability, and that of the true action, each `[cells, tokens]`.
    """
    # Every token is an example; token 0 of the document is the separator.
    zeros = np.zeros(len(true), np.int64)
    examples = Examples.of_tokens(zeros, 1 + np.arange(len(true)), zeros, np.zeros((len(true), 1), np.int64))
    chunks = []
    for rows, stacks in reader.chunks(examples):
        activations = {
            point: values[0]
            for stack, points in zip(reader.stacks, stacks, strict=True)
            for point, values in zip(stack.points, points, strict=True)
        }
        actions, cells = torch.from_numpy(true[rows]), []
        for point in probes.points:
            values, probe = activations[point], probes.at(point)
            probe = LinearProbe(probe.coef.to(values.device), probe.intercept.to(values.device))
            probabilities = probe.log_probabilities(values).exp().cpu()
            highest = probabilities.max(dim=-1)
            wanted = actions.clamp(min=0).expand(len(probabilities), -1)[..., None]
            of_true = probabilities.gather(-1, wanted)[..., 0].masked_fill(actions == NONE, torch.nan)
            cells.append((highest.indices, highest.values, of_true))
        chunks.append([torch.cat(parts).numpy() for parts in zip(*cells, strict=True)])
        task.advance(rows.stop - rows.start)
    top, probability, true_probability = (
        np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True)
    )
    return top, probability, true_probability


def _planner_scores(run: TextRun, variant: VariantName, cut: Text) -> Tensor | None:
    """The planner's scores of every sentence and of the one after them `[sentences + 1, actions]`."""
    if not run.finished("planner"):
        return None
    embeddings = torch.from_numpy(np.pad(cut.embeddings, ((0, 1), (0, 0)))).to(run.device)
    with torch.no_grad():
        return run.planner(variant)(embeddings[None])[0].cpu()


def _conditioning(
    run: TextRun, probes: KeptProbes, reader: Reader, scores: Tensor | None, cut: Text
) -> dict[str, Any] | None:
    """What the LM was conditioned on; see `LensData`."""
    if (variant := probes.variant) not in VARIANTS:
        return None
    mixing = VARIANTS[variant].evaluation
    sentences = torch.zeros(len(cut.actions) + 1, dtype=torch.long)
    # Mixing the rows of an identity matrix gives the weights of the actions.
    weights = mixing(
        torch.empty(0) if scores is None else scores,
        sentences,
        torch.eye(run.corpus.k),
        run.temperature(variant),
    )
    weight, action = weights.max(dim=-1)
    changed = reader.changed_by_conditioning() if mixing.needs_scores else set()
    predicted = np.arange(len(cut.pieces)) + 1 - CONDITIONINGS[run.config.conditioning.kind].lag
    return {
        "action": action.numpy(),
        "weight": weight.numpy(),
        "carried": np.searchsorted(run.corpus.first_token - 1, predicted, side="right") - 1,
        "planned": mixing.needs_scores,
        "changed": [point in changed for point in probes.points],
    }


def _examples(corpus: Corpus, actions: np.ndarray) -> dict[int, list[str]]:
    """Different training sentences nearest to each of some actions."""
    train = np.zeros(len(corpus.first_token), bool)
    train[corpus.sentences(corpus.documents("train"))] = True
    labels = np.where(train, corpus.known_actions, -1)
    nearest = nearest_sentences(corpus.embeddings, labels, corpus.codebook, 2 * EXAMPLES)
    texts = {int(action): corpus.sentence_texts(nearest[action][nearest[action] >= 0]) for action in actions}
    return {action: list(dict.fromkeys(found))[:EXAMPLES] for action, found in texts.items()}


def _facts(run: Run, probes: KeptProbes) -> dict[str, str]:
    lm, corpus, documents = run.config.lm, run.config.corpus, probes.documents
    facts = {
        "Run": run.folder.resolve().name,
        "Variant": probes.variant,
        "Model": lm.name or f"new GPT-2, {lm.layers} layers of width {lm.width}",
        "Corpus": corpus.path or f"{corpus.reader} ({run.corpus.facts['documents']:,} documents)",
        "Probes": f"{probes.solver}, seed {probes.seed}, for one of {run.corpus.k:,} actions; fitted on "
        f"{documents['probe']:,} documents, selected on {documents['validation']:,}, tested on "
        f"{documents['test']:,}",
    }
    few = too_few(documents["test"])
    return facts | ({"Beware": few} if few else {})
