"""Builds a corpus folder from text: documents, tokens, sentences, embeddings, actions.

Every pass streams the documents in batches and appends to arrays on disk: memory grows only by a few numbers
for each document and sentence. Encoder, codebook and tokenizer are fitted on bounded samples. Large corpora
are tokenised and embedded on all cores, with the same result to the bit as on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import joblib
import numpy as np

from probekit.config import ActionSettings, Config, CorpusSettings
from probekit.data.action_words import telling_words
from probekit.data.codebook import fit_codebook, label_centroids
from probekit.data.corpus import SPLITS, Corpus, ranges
from probekit.data.documents import DocumentFile
from probekit.data.encoders import (
    EMBEDDED_AT_ONCE,
    PretrainedEncoder,
    SentenceEncoder,
    TfidfEncoder,
    embed_batch,
)
from probekit.data.readers import write_documents
from probekit.data.sentences import sentences_of_batch, tokenize_batch
from probekit.data.special_tokens import bos_rule_for, bos_rule_of_chats, separator_id
from probekit.data.splits import group_documents, group_note, split_documents
from probekit.data.tokenizer import pretrained_tokenizer, train_tokenizer, vocabulary_size
from probekit.errors import ProbekitError
from probekit.io import ArrayAppender, atomic_folder, read_array, write_array, write_json
from probekit.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")

TOKENIZER_CHARACTERS = 100_000_000
"""The tokenizer of a new LM is trained on about this many characters at most: more changes it little."""
MANY_CHARACTERS = 1 << 23
"""Shorter texts are done on one core before other processes have started."""

FEW_OF_ACTION = 20
"""With fewer training sentences for each action on average, the user is warned."""

_ROWS_AT_ONCE = 1 << 14


def write_corpus(config: Config, folder: Path, progress: Progress, device: str = "cpu") -> Corpus:
    """Builds the corpus that the settings describe, and opens it.

    Args:
        config: The sections `corpus`, `actions` and `lm` (for its tokenizer) are used.
        folder: Written whole or not at all.
        progress: Shows every stage.
        device: Where a pre-trained sentence encoder computes.

    Raises:
        ProbekitError: The text cannot be read or is too small for the settings.
    """
    if config.actions.labels == "planted" and config.corpus.reader != "planted":
        raise ProbekitError(
            f"actions.labels is 'planted', but corpus.reader is {config.corpus.reader!r}: only the planted "
            "corpus knows its actions; use clusters"
        )
    # Whatever may be missing is looked for before any text is read, which may take hours.
    with_actions = config.actions.labels != "none"
    encoder: SentenceEncoder | None = None
    if with_actions and config.actions.encoder != "tfidf":
        long_sentences = config.actions.long_sentences
        encoder = PretrainedEncoder(config.actions.encoder, device, long_sentences=long_sentences)
    tokenizer = None if config.lm.name is None else pretrained_tokenizer(config.lm)
    with atomic_folder(folder) as partial:
        facts, keys, characters = write_documents(
            config.corpus, partial / "documents.arrow", progress, tokenizer
        )
        documents = DocumentFile(partial / "documents.arrow")
        group = group_documents(keys)
        write_array(partial / "group.npy", group)
        split = split_documents(config.corpus, keys, group, lambda number: documents[int(number)].name)
        write_array(partial / "split.npy", split)
        train = split == SPLITS.index("train")
        if not train.any() and (tokenizer is None or with_actions):
            where = f"corpus.split_column {config.corpus.split_column!r} names"
            if config.corpus.split_column is None:
                where = "the sum of corpus.probe_fraction, validation_fraction and test_fraction leaves"
            raise ProbekitError(
                f"{where} no document 'train', which the tokenizer of a new LM and actions are fitted on; "
                "leave some, or give lm.name and actions.labels none"
            )
        facts |= {"actions": with_actions, "groups": len(np.unique(group))}
        if line := group_note(facts["groups"], len(documents)):
            progress.say(line)
        processes = joblib.cpu_count() if characters >= MANY_CHARACTERS else 1

        if tokenizer is None:
            with progress.task("train the tokenizer"):
                texts = _tokenizer_texts(documents, train, characters, config.corpus.seed)
                tokenizer = train_tokenizer(texts, config.lm.vocabulary, partial / "tokenizer")
        else:
            tokenizer.save_pretrained(partial / "tokenizer")
        facts["bos"] = bos_rule_for(tokenizer, config.lm.bos)
        if facts["chats"]:
            facts["bos"] = bos_rule_of_chats(tokenizer, facts["bos"], documents[0].text)
        facts |= _write_tokens(partial, config.corpus, tokenizer, documents, processes, progress)

        if with_actions:
            facts |= _write_actions(partial, config, documents, train, encoder, processes, progress)
        write_json(partial / "facts.json", facts)
    return Corpus.open(folder)


def _tokenizer_texts(documents: DocumentFile, train: np.ndarray, characters: int, seed: int) -> Iterator[str]:
    """The texts of all training documents or, of more text than is needed, of some drawn at random."""
    share = TOKENIZER_CHARACTERS / (characters * train.mean())
    if share < 1:
        train = train & (np.random.default_rng(seed).random(len(train)) < share)
    for first, batch in documents.batches():
        yield from (document.text for number, document in enumerate(batch, first) if train[number])


def _write_tokens(
    folder: Path,
    settings: CorpusSettings,
    tokenizer: PreTrainedTokenizerBase,
    documents: DocumentFile,
    processes: int,
    progress: Progress,
) -> dict[str, Any]:
    """Writes tokens and sentences, and their bounds in documents; returns facts about them."""
    token_type = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32
    shared = (separator_id(tokenizer), settings.language)
    calls = ((folder, batch, *shared) for batch in range(len(documents.starts) - 1))
    document_tokens, document_sentences = [], []
    total = 0
    with ExitStack() as stack, progress.task("tokenise", total=len(documents)) as task:

        def appender(name: str, dtype: Any, columns: tuple[int, ...] = ()) -> ArrayAppender:
            return stack.enter_context(ArrayAppender(folder / f"{name}.npy", dtype, columns))

        tokens, first_token = appender("tokens", token_type), appender("first_token", np.int64)
        spans = appender("spans", np.int64, (2,))
        planted = appender("planted_actions", np.int32) if settings.reader == "planted" else None
        for batch in _in_order(tokenize_batch, calls, processes):
            tokens.append(batch.tokens)
            first_token.append(batch.first_token + total)
            spans.append(batch.spans)
            if planted is not None and batch.planted_actions is not None:
                planted.append(batch.planted_actions)
            document_tokens.append(batch.document_tokens)
            document_sentences.append(batch.document_sentences)
            total += len(batch.tokens)
            task.advance(len(batch.document_tokens))
    lengths = np.concatenate(document_sentences)
    write_array(folder / "document_tokens.npy", _bounds(np.concatenate(document_tokens)))
    write_array(folder / "document_sentences.npy", _bounds(lengths))
    return {
        "tokens": total - len(documents),
        "sentences": int(lengths.sum()),
        "one_sentence_documents": int((lengths == 1).sum()),
        "vocabulary": len(tokenizer),
    }


def _write_actions(
    folder: Path,
    config: Config,
    documents: DocumentFile,
    train: np.ndarray,
    encoder: SentenceEncoder | None,
    processes: int,
    progress: Progress,
) -> dict[str, Any]:
    """Embeds all sentences and clusters them; returns facts about the actions."""
    document_sentences = read_array(folder / "document_sentences.npy")
    numbers = np.flatnonzero(train)
    candidates = ranges(document_sentences[numbers], document_sentences[numbers + 1])
    sample = _draw_sample(candidates, config.actions, config.corpus.seed)
    if (each := len(candidates) / config.actions.k) < FEW_OF_ACTION:
        progress.say(
            f"{config.actions.k:,} actions of {len(candidates):,} training sentences are {each:.1f} "
            "each, too few to learn what follows them; lower actions.k or give more text"
        )
    texts = _sentences(folder, documents, sample)
    if encoder is None:
        with progress.task("fit the sentence encoder"):
            encoder = TfidfEncoder.fit(texts, config.actions.dimensions, config.corpus.seed)
    encoder.save(folder / "encoder")
    total = int(document_sentences[-1])
    with (
        progress.task("embed sentences", total=total) as task,
        ArrayAppender(folder / "embeddings.npy", np.float32, (encoder.dimensions,)) as embeddings,
    ):
        for block in _embedded(folder, documents, encoder, processes):
            embeddings.append(block)
            task.advance(len(block))
    facts: dict[str, Any] = {}
    if isinstance(encoder, PretrainedEncoder) and encoder.long:
        facts["long_sentences"] = encoder.long
        cut = "cut there (--actions.long_sentences mean reads all)"
        progress.say(
            f"{encoder.long:,} of {total:,} sentences are longer than the {encoder.longest} tokens that the "
            f"sentence encoder reads: they are {cut if encoder.cuts else 'read in pieces'}"
        )
    with progress.task("cluster sentences into actions"):
        facts |= _cluster(folder, config, candidates, sample, texts)
    known = read_array(folder / "embeddings.npy").any(axis=1)
    if config.actions.labels == "clusters" and not known.all():
        facts["sentences_without_action"] = int((~known).sum())
        progress.say(
            f"{facts['sentences_without_action']:,} of {total:,} sentences hold no word that the sentence "
            "encoder knows: they have no action to predict"
        )
    return facts


def _draw_sample(candidates: np.ndarray, settings: ActionSettings, seed: int) -> np.ndarray:
    """Numbers of the training sentences that encoder and codebook are fitted on, in order."""
    if len(candidates) < settings.k:
        raise ProbekitError(
            f"actions.k is {settings.k}, but the training documents have {len(candidates)} sentences; lower "
            "actions.k or give more text"
        )
    size = min(settings.fit_sentences, len(candidates))
    return np.sort(np.random.default_rng(seed).choice(candidates, size=size, replace=False))


def _sentences(folder: Path, documents: DocumentFile, chosen: np.ndarray) -> list[str]:
    """The texts of sentences by their numbers, which are in order."""
    texts: list[str] = []
    first = 0
    for batch in enumerate(documents.starts[:-1].tolist()):
        sentences = sentences_of_batch(folder, *batch)
        here = chosen[slice(*np.searchsorted(chosen, [first, first + len(sentences)]))] - first
        texts += [sentences[n] for n in here.tolist()]
        first += len(sentences)
    return texts


def _embedded(
    folder: Path, documents: DocumentFile, encoder: SentenceEncoder, processes: int
) -> Iterator[np.ndarray]:
    """The embeddings of all sentences, a block at a time."""
    batches = enumerate(documents.starts[:-1].tolist())
    if isinstance(encoder, TfidfEncoder):
        yield from _in_order(embed_batch, ((folder, *batch) for batch in batches), processes)
        return
    # A pre-trained encoder gets full batches, across those of the documents.
    size, waiting = EMBEDDED_AT_ONCE, list[str]()
    for batch in batches:
        waiting += sentences_of_batch(folder, *batch)
        full = len(waiting) - len(waiting) % size
        yield from (encoder.encode(waiting[start : start + size]) for start in range(0, full, size))
        del waiting[:full]
    if waiting:
        yield encoder.encode(waiting)


def _cluster(
    folder: Path, config: Config, candidates: np.ndarray, sample: np.ndarray, texts: Sequence[str]
) -> dict[str, Any]:
    """Clusters embeddings, writes codebook and actions; returns facts; `texts` are the sample's."""
    embeddings = read_array(folder / "embeddings.npy")
    fitted_on = np.empty((len(sample), embeddings.shape[1]), embeddings.dtype)
    for part in np.array_split(np.arange(len(sample)), len(sample) // _ROWS_AT_ONCE + 1):
        fitted_on[part] = embeddings[sample[part]]
    said = fitted_on.any(axis=1)  # a sentence without a word that is known would have a cluster of its own
    codebook = fit_codebook(
        fitted_on if said.all() else fitted_on[said], config.actions.k, config.corpus.seed
    )
    actions = codebook.nearest(embeddings)
    facts: dict[str, Any] = {}
    if config.corpus.reader == "planted":
        from sklearn.metrics import adjusted_rand_score

        planted = np.array(read_array(folder / "planted_actions.npy"))
        facts["adjusted_rand_index"] = float(adjusted_rand_score(planted[candidates], actions[candidates]))
        if config.actions.labels == "planted":
            actions = planted
            codebook = label_centroids(fitted_on, actions[sample], config.corpus.planted.actions)
    write_array(folder / "actions.npy", actions)
    codebook.save(folder / "codebook.safetensors")
    return facts | {"action_words": telling_words(texts, actions[sample], len(codebook.centroids))}


def _in_order(function: Callable[..., T], calls: Iterable[tuple[Any, ...]], processes: int) -> Iterator[T]:
    """Calls a function in processes and yields its results in the order of the calls; few are in memory."""
    parallel = joblib.Parallel(processes, return_as="generator", idle_worker_timeout=30)
    yield from parallel(joblib.delayed(function)(*call) for call in calls)
    if processes > 1:
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True)  # idle processes would keep their memory


def _bounds(lengths: np.ndarray) -> np.ndarray:
    """Where each of several consecutive parts of these lengths begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
