"""Builds a corpus folder from text: documents, tokens, sentences, embeddings, actions.

Every pass streams the documents in batches and appends to arrays on disk, so memory does not grow with the
corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from probekit.config import Config, CorpusSettings
from probekit.corpus.actions import fit_codebook, label_centroids
from probekit.corpus.embeddings import fit_encoder
from probekit.corpus.readers import read_documents
from probekit.corpus.sentences import align, sentence_spans
from probekit.corpus.store import SPLITS, Corpus, DocumentTexts, ranges
from probekit.corpus.tokenizer import pretrained_tokenizer, separator_id, train_tokenizer
from probekit.errors import ProbekitError
from probekit.progress import Progress
from probekit.storage import ArrayAppender, atomic_folder, read_array, write_array, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_BATCH = 256

T = TypeVar("T")

_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("text", pa.large_string()),
        ("actions", pa.list_(pa.int32())),
        ("kind", pa.int32()),
    ]
)


def write_corpus(config: Config, folder: Path, progress: Progress, device: str = "cpu") -> Corpus:
    """Builds the corpus that the settings describe and opens it.

    Args:
        config: The sections `corpus`, `actions` and `lm` (for its tokenizer) are used.
        folder: Written whole or not at all.
        progress: Told of every stage.
        device: Where a pre-trained sentence encoder computes.

    Raises:
        ProbekitError: The text cannot be read or is too small for the settings.
    """
    if config.actions.labels == "planted" and config.corpus.reader != "planted":
        raise ProbekitError(
            f"actions.labels is 'planted', but corpus.reader is {config.corpus.reader!r}: only the planted "
            "corpus knows its actions; use clusters"
        )
    with atomic_folder(folder) as partial:
        facts = _write_documents(config.corpus, partial, progress)
        texts = DocumentTexts(partial / "documents.arrow")
        split = _write_splits(config.corpus, partial, facts.pop("digests"))
        tokenizer = _make_tokenizer(config, texts, split, partial)
        facts |= _write_tokens(config, texts, tokenizer, partial, progress)
        facts |= _write_actions(config, texts, split, partial, progress, device)
        write_json(partial / "facts.json", facts)
    return Corpus.open(folder)


def _write_documents(settings: CorpusSettings, folder: Path, progress: Progress) -> dict[str, Any]:
    digests: list[int] = []
    blank = 0
    fingerprint = hashlib.sha256()
    with (
        progress.task("read documents") as task,
        pa.OSFile(str(folder / "documents.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA) as writer,
    ):
        for batch in _batches(task.track(read_documents(settings)), DOCUMENTS_PER_BATCH):
            kept = [document for document in batch if document.text.strip()]
            blank += len(batch) - len(kept)
            for document in kept:
                digest = hashlib.blake2b(
                    document.text.encode("utf-8", "surrogatepass"), digest_size=8
                ).digest()
                digests.append(int.from_bytes(digest))
                fingerprint.update(digest)
            if kept:
                writer.write_batch(pa.RecordBatch.from_pylist([vars(d) for d in kept], schema=_SCHEMA))
    if not digests:
        raise ProbekitError(f"corpus.path {settings.path!r}: all its {blank} documents are blank")
    return {
        "documents": len(digests),
        "blank_documents_dropped": blank,
        "fingerprint": fingerprint.hexdigest(),
        "digests": np.array(digests, dtype=np.uint64),
    }


def _write_splits(settings: CorpusSettings, folder: Path, digests: np.ndarray) -> np.ndarray:
    """Splits by content: documents with one text never part, and the order of reading does not matter."""
    shares = [settings.probe_fraction, settings.validation_fraction, settings.test_fraction]
    unique, inverse = np.unique(digests, return_inverse=True)
    counts = [round(share * len(unique)) for share in shares]
    counts.insert(0, len(unique) - sum(counts))
    for name, count, share in zip(SPLITS, counts, [1.0, *shares], strict=True):
        if share and count < 1:
            raise ProbekitError(
                f"the corpus has {len(unique)} distinct documents, which leaves none for the split {name!r}; "
                "give more documents, change corpus.probe_fraction, corpus.validation_fraction and "
                "corpus.test_fraction, or cut text files into documents by corpus.separator"
            )
    order = np.random.default_rng(settings.seed).permutation(len(unique))
    split_of_unique = np.empty(len(unique), dtype=np.uint8)
    split_of_unique[order] = np.repeat(np.arange(len(SPLITS)), counts)
    split = split_of_unique[inverse]
    write_array(folder / "split.npy", split)
    return split


def _make_tokenizer(
    config: Config, texts: DocumentTexts, split: np.ndarray, folder: Path
) -> PreTrainedTokenizerBase:
    if config.lm.name is None:
        train = (
            row["text"]
            for first, rows in texts.batches()
            for number, row in enumerate(rows, first)
            if SPLITS[split[number]] == "train"
        )
        return train_tokenizer(train, config.lm.vocabulary, folder / "tokenizer")
    tokenizer = pretrained_tokenizer(config.lm)
    with atomic_folder(folder / "tokenizer") as partial:
        tokenizer.save_pretrained(partial)
    return tokenizer


def _write_tokens(
    config: Config, texts: DocumentTexts, tokenizer: PreTrainedTokenizerBase, folder: Path, progress: Progress
) -> dict[str, Any]:
    separator = separator_id(tokenizer)
    token_type = np.uint16 if len(tokenizer) < 2**16 else np.uint32
    document_tokens, document_sentences = [0], [0]
    with ExitStack() as stack, progress.task("tokenise", total=len(texts)) as task:

        def appender(name: str, dtype: Any, columns: tuple[int, ...] = ()) -> ArrayAppender:
            return stack.enter_context(ArrayAppender(folder / f"{name}.npy", dtype, columns))

        tokens, first_token = appender("tokens", token_type), appender("first_token", np.int64)
        spans = appender("spans", np.int64, (2,))
        planted = appender("planted_actions", np.int32) if config.corpus.reader == "planted" else None
        for _, rows in texts.batches():
            encoded = tokenizer(
                [row["text"] for row in rows],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for row, ids, offsets in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                whole = sentence_spans(row["text"], config.corpus.language)
                aligned = align(row["text"], whole, np.array(offsets, dtype=np.int64).reshape(-1, 2))
                tokens.append(np.array([separator, *ids]))
                first_token.append(aligned.first_token + document_tokens[-1] + 1)
                spans.append(aligned.spans)
                if planted is not None:
                    planted.append(_matched(row, len(aligned.spans)))
                document_tokens.append(document_tokens[-1] + 1 + len(ids))
                document_sentences.append(document_sentences[-1] + len(aligned.spans))
            task.advance(len(rows))
    write_array(folder / "document_tokens.npy", np.array(document_tokens, dtype=np.int64))
    write_array(folder / "document_sentences.npy", np.array(document_sentences, dtype=np.int64))
    lengths = np.diff(document_sentences)
    return {
        "tokens": document_tokens[-1] - len(texts),
        "sentences": document_sentences[-1],
        "one_sentence_documents": int((lengths == 1).sum()),
        "vocabulary": len(tokenizer),
    }


def _matched(row: dict[str, Any], sentences: int) -> np.ndarray:
    if len(row["actions"]) != sentences:
        raise ProbekitError(
            f"document {row['name']!r} was planted with {len(row['actions'])} sentences, but the splitter "
            f"finds {sentences}; corpus.language must be 'en' for the planted corpus"
        )
    return np.array(row["actions"], dtype=np.int32)


def _write_actions(
    config: Config,
    texts: DocumentTexts,
    split: np.ndarray,
    folder: Path,
    progress: Progress,
    device: str,
) -> dict[str, Any]:
    settings, seed = config.actions, config.corpus.seed
    document_sentences = read_array(folder / "document_sentences.npy")
    train = np.flatnonzero(split == SPLITS.index("train"))
    candidates = ranges(document_sentences[train], document_sentences[train + 1])
    if len(candidates) < settings.k:
        raise ProbekitError(
            f"actions.k is {settings.k}, but the training documents have {len(candidates)} sentences; lower "
            "actions.k or give more text"
        )
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(candidates, size=min(settings.fit_sentences, len(candidates)), replace=False))
    spans = read_array(folder / "spans.npy")

    with progress.task("fit the sentence encoder"):
        chosen = set(sample.tolist())
        sampled = [s for n, s in enumerate(_sentence_texts(texts, document_sentences, spans)) if n in chosen]
        encoder = fit_encoder(settings, sampled, seed, device)
        encoder.save(folder / "encoder")
    with (
        progress.task("embed sentences", total=len(spans)) as task,
        ArrayAppender(folder / "embeddings.npy", np.float32, (encoder.dimensions,)) as embeddings,
    ):
        for batch in _batches(_sentence_texts(texts, document_sentences, spans), settings.batch_size):
            embeddings.append(encoder.encode(batch))
            task.advance(len(batch))
    with progress.task("cluster sentences into actions"):
        vectors = read_array(folder / "embeddings.npy")
        codebook = fit_codebook(vectors[sample], settings.k, seed)
        actions = codebook.nearest(vectors)
        facts: dict[str, Any] = {}
        if config.corpus.reader == "planted":
            facts["adjusted_rand_index"] = _agreement(folder, actions, candidates)
        if settings.labels == "planted":
            actions = np.array(read_array(folder / "planted_actions.npy"))
            codebook = label_centroids(vectors[sample], actions[sample], config.corpus.planted.actions)
    write_array(folder / "actions.npy", actions)
    codebook.save(folder / "codebook.safetensors")
    return facts


def _agreement(folder: Path, clusters: np.ndarray, sentences: np.ndarray) -> float:
    from sklearn.metrics import adjusted_rand_score

    planted = read_array(folder / "planted_actions.npy")
    return float(adjusted_rand_score(planted[sentences], clusters[sentences]))


def _sentence_texts(texts: DocumentTexts, document_sentences: np.ndarray, spans: np.ndarray) -> Iterator[str]:
    for first, rows in texts.batches():
        for number, row in enumerate(rows, first):
            for start, end in spans[document_sentences[number] : document_sentences[number + 1]]:
                yield row["text"][start:end].strip()


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
