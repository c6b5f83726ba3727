"""Targets of a table whose rows label ranges of tokens: a text, a sentence, a span, or messages of a chat.

A row finds its document by its text, or by `document` (number or name); `sentence` and the characters `start`
and `end` narrow the range. With `probe.roles` each message of these roles in a chat is one. Labels are what
is written: `01` and `1` are two classes, `nan` is one, an empty field is none. Lists of numbers, in JSON
lines or Parquet, are vectors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from probekit.config import Config
from probekit.data.corpus import Corpus
from probekit.data.sentences import token_spans, tokens_of
from probekit.data.splits import digest
from probekit.errors import ProbekitError
from probekit.probing.label_table import LabelTable, read_table
from probekit.probing.targets import (
    MOST_CLASSES,
    NO_LABEL,
    Ranges,
    Target,
    are_numbers,
    find_target,
    nearly_two_classes,
    sentence_target,
    vary,
)

SHOWN_CLASSES = 12
"""So many classes are listed with their counts."""

ABSENT = -1
"""The document of a row whose text is not in the corpus, and the sentence of a row that names none."""


def target_of(corpus: Corpus, config: Config) -> Target:
    """The target that the settings name: a column of the table of labels, or a built-in one.

    Args:
        corpus: The corpus.
        config: The settings; `probe.target`, `probe.labels` and `probe.text_column` say what is read.

    Raises:
        ProbekitError: There is no such column or target, or its labels do not fit the corpus.
    """
    name = config.probe.target
    table = None if config.probe.labels is None else read_table(config.probe.labels, name, config)
    if table is None:
        if config.probe.roles is not None:
            raise ProbekitError(f"probe.roles goes with a column of probe.labels, not with target {name!r}")
        return find_target(corpus, name)
    document, sentence = _places(corpus, table, config)
    labelled = np.array([label is not None for label in table.labels], dtype=bool)
    rows = np.flatnonzero(labelled & (document != ABSENT))
    made_of = config.corpus.path or config.corpus.reader
    if labelled.any() and not len(rows):
        raise ProbekitError(
            f"probe.labels {table.path}: no row with a label has a text of the corpus, which was made of "
            f"{made_of}; name the column that holds texts by --text, or make a corpus of this table "
            "by --model with --text, in another --out or with --overwrite"
        )
    coded = _coded(table, name, rows, config.probe.kind)
    code = coded.code
    notes: tuple[str, ...] = ()
    if config.probe.roles is None:
        start, stop = _tokens_of(corpus, table, rows, document[rows], sentence[rows])
        second = _second(corpus, table, rows, document[rows], sentence[rows])
    else:
        second = None
        picked, start, stop, notes = _messages(corpus, table, rows, document, config.probe.roles)
        rows, code = rows[picked], code[picked]
    ranges, kept = _distinct(table, rows, Ranges(document[rows], start, stop, code, second))
    whole = (sentence[kept] != ABSENT) & (table.numbers("start")[kept] < 0)
    of_sentence = sentence[kept] if whole.all() else None
    coded = coded._replace(code=ranges.labels)
    left_out = {
        "have no label": int((~labelled).sum()),
        f"have a text that is not in the corpus, which was made of {made_of}": int(
            (document == ABSENT).sum()
        ),
        "label what an equal row labels": len(rows) - len(kept),
    }
    first, *odd = _described(table, name, coded)
    absent = [
        f"{count:,} of {len(table.where):,} rows of labels {why}, and are left out"
        for why, count in left_out.items()
        if count > 0
    ]
    if of_sentence is None:
        kind, classes = coded.kind, len(coded.names)
        target = Target(name, classes, ranges, None, coded.names, kind, positions=("last",))
        target = target if coded.vectors is None else replace(target, vectors=coded.vectors)
    else:
        missing = np.nan if coded.kind == "numbers" else NO_LABEL
        of_sentences = np.full(len(corpus.first_token), missing, dtype=coded.code.dtype)
        of_sentences[of_sentence] = coded.code
        target = sentence_target(corpus, name, len(coded.names), of_sentences, coded.names, coded.vectors)
    return replace(target, notes=(first, *absent, *odd, *notes))


def beyond_window(corpus: Corpus, target: Target, window: int) -> str | None:
    """A line if the LM cannot read at once all of the text up to the end of some labelled ranges."""
    if not isinstance(target.labels, Ranges):
        return None
    second = target.labels.second
    last = target.labels.stop if second is None else np.maximum(target.labels.stop, second[:, 1])
    before = last - corpus.document_tokens[target.labels.document]
    if not (count := int((before > window).sum())):
        return None
    return (
        f"{count:,} of {len(before):,} labelled ranges end after the {window:,} tokens that the LM reads at "
        "once: it has not read the beginning there; raise probe.window, or label shorter texts"
    )


def _places(corpus: Corpus, table: LabelTable, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The document and the sentence that each row names `[rows]`, `ABSENT` where there is none."""
    if table.texts is None:
        document = _named_documents(corpus, table)
    elif table.texts in table.columns:
        document = _documents_of(corpus, table.columns[table.texts])
    elif len(table.where) == len(corpus.first_token):
        sentence = np.arange(len(table.where))
        return corpus.document_of(sentence), sentence
    else:
        raise ProbekitError(
            f"probe.labels {table.path} has {len(table.where):,} rows, but the corpus has "
            f"{len(corpus.first_token):,} sentences; name its column of texts by --text, or write a table to "
            "fill in with `probekit corpus RUN --export FILE`"
        )
    within = table.numbers("sentence")
    first, last = corpus.document_sentences[document], corpus.document_sentences[document + 1]
    if len(wrong := np.flatnonzero((document != ABSENT) & (within >= last - first))):
        row = int(wrong[0])
        raise ProbekitError(
            f"{table.where[row]}: 'sentence' is {within[row]}, but document {document[row]} has "
            f"{last[row] - first[row]}, from 0 on"
        )
    sentence = np.where((document == ABSENT) | (within < 0), ABSENT, first + within)
    if table.texts is None:
        texts = config.corpus.text_column
        numbers = texts in ("document", "sentence") or texts not in table.columns
        exported = "text" if "sentence" in table.columns and numbers else texts
        _check_texts(corpus, table, exported, document, sentence)
    return document, sentence


def _check_texts(
    corpus: Corpus, table: LabelTable, column: str, document: np.ndarray, sentence: np.ndarray
) -> None:
    """Refuses a row whose text is not that of the document or sentence that it names, white space aside."""
    number, own_document = ABSENT, corpus.texts[0]
    for row, given in enumerate(table.columns.get(column, ())):
        if given is None:
            continue
        if document[row] != number:
            number = int(document[row])
            own_document = corpus.texts[number]
        span = slice(*corpus.spans[sentence[row]])
        own = own_document.key if sentence[row] == ABSENT else own_document.text[span]
        if own.split() != given.split():
            what = "document" if sentence[row] == ABSENT else "sentence"
            raise ProbekitError(
                f"{table.where[row]}: {column!r} is {given.strip()[:40]!r}, but that {what} of the corpus is "
                f"{own.strip()[:40]!r}; label this corpus's texts (`probekit corpus RUN --export FILE`)"
            )


def _named_documents(corpus: Corpus, table: LabelTable) -> np.ndarray:
    """Documents by number, or by name where not all values are numbers `[rows]`."""
    values = ["" if value is None else value for value in table.columns["document"]]
    count = len(corpus.split)
    numbers = [re.fullmatch(r"(\d+)(\.0*)?", value) for value in values if value]
    if all(numbers):
        values = [value and str(int(value.partition(".")[0])) for value in values]
        names = [str(number) for number in range(count)]
    else:
        names = [document.name for _, batch in corpus.texts.batches() for document in batch]
    number_of = {name: number for number, name in enumerate(names)}
    times = Counter(names)
    for row, value in enumerate(values):
        if times[value] != 1:
            why = "no document has that" if not times[value] else f"{times[value]:,} documents have that name"
            raise ProbekitError(
                f"{table.where[row]}: 'document' is {value!r}; {why}; give numbers from 0 to "
                f"{count - 1:,}, or names such as {corpus.texts[0].name!r}"
            )
    return np.array([number_of[value] for value in values], dtype=np.int64)


def _documents_of(corpus: Corpus, texts: Sequence[str | None]) -> np.ndarray:
    """The first document of each text `[rows]`."""
    number_of: dict[bytes, int] = {}
    for first, batch in corpus.texts.batches():
        for number, document in enumerate(batch, first):
            number_of.setdefault(digest(document.key), number)
    found = (ABSENT if text is None else number_of.get(digest(text), ABSENT) for text in texts)
    return np.fromiter(found, dtype=np.int64, count=len(texts))


class Coded(NamedTuple):
    """Labels as numbers.

    Attributes:
        kind: What they are.
        code: The number of each label's class, or of its vector, or the label itself `[rows]`.
        names: The classes.
        vectors: The different vectors `[vectors, outputs]`.
    """

    kind: Literal["classes", "numbers", "vectors"]
    code: np.ndarray
    names: tuple[str, ...] = ()
    vectors: np.ndarray | None = None


def _coded(table: LabelTable, name: str, rows: np.ndarray, kind: str) -> Coded:
    """The labels of some rows, none of which is empty, as numbers."""
    if table.vectors:
        vectors, code = _vectors(table, name, rows, kind)
        return Coded("vectors", code, vectors=vectors)
    labels = [str(table.labels[row]) for row in rows]
    numbers = kind == "numbers"
    if kind == "auto" and all(map(_is_number, labels)):
        values = np.array(labels, dtype=np.float64)
        numbers = bool(np.isfinite(values).all()) and are_numbers(values)
    if not numbers:
        names, code = _classes(labels, f"probe.labels {table.path}: column {name!r}")
        return Coded("classes", code, names)
    if words := [label for label in labels if not _is_number(label)]:
        raise ProbekitError(
            f"probe.kind is 'numbers', but column {name!r} of {table.path} holds {words[0][:20]!r}; "
            "leave such fields empty, or give probe.kind classes"
        )
    values = np.array(labels, dtype=np.float64)
    if not vary(values):
        raise ProbekitError(
            f"probe.labels {table.path}: {name!r} goes from {values.min():g} to {values.max():g}, "
            "which leaves nothing to predict, or has no finite variance; scale them, or give others"
        )
    return Coded("numbers", values)


def _classes(labels: Sequence[str], described: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes, sorted, and the number of each label's class `[rows]`."""
    names = sorted(set(labels))
    if all(map(_is_number, names)):
        if infinite := [name for name in names if abs(float(name)) == np.inf]:
            raise ProbekitError(
                f"{described} holds {infinite[0][:20]!r}, which is no finite number; leave such rows out, or "
                "write a word for each class"
            )
        if any(float(name) % 1 for name in names):
            raise ProbekitError(
                f"{described} holds {len(names):,} different numbers with fractions, not classes; write a "
                "word or a whole number for each class"
            )
        names.sort(key=float)
    if len(names) > MOST_CLASSES:
        raise ProbekitError(f"{described} has {len(names):,} classes; at most {MOST_CLASSES:,} can be probed")
    if len(names) < 2:
        raise ProbekitError(f"{described} has fewer than two classes: {', '.join(names) or 'none'}")
    number_of = {name: number for number, name in enumerate(names)}
    return tuple(names), np.array([number_of[label] for label in labels], dtype=np.int64)


def _vectors(table: LabelTable, name: str, rows: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The different vectors of some rows `[vectors, outputs]`, and the number of each row's `[rows]`."""
    if kind != "auto":
        raise ProbekitError(
            f"probe.kind is {kind!r}, but column {name!r} of {table.path} holds lists, which are vectors; "
            "leave probe.kind auto"
        )
    length = len(next(iter(table.vectors.values())))
    for row in rows.tolist():
        if row not in table.vectors or len(table.vectors[row]) != length:
            raise ProbekitError(
                f"{table.where[row]}: {name!r} is {str(table.labels[row])[:20]!r}, but the first vector is a "
                f"list of {length}; all must be lists of one length"
            )
    vectors, code = np.unique([table.vectors[row] for row in rows.tolist()], axis=0, return_inverse=True)
    if len(vectors) < 2:
        raise ProbekitError(f"probe.labels {table.path}: all vectors of {name!r} are equal")
    return vectors, code.reshape(-1)


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)  # a column that holds `nan` holds words
    except ValueError:
        return False


def _messages(
    corpus: Corpus, table: LabelTable, rows: np.ndarray, document: np.ndarray, roles: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """The messages of some roles in the chats of some rows, and notes on them.

    Returns:
        Of each message its number in `rows`, its first token, the token after its last one; and the notes.
    """
    for column in ("sentence", "start"):
        if (table.numbers(column)[rows] >= 0).any():
            raise ProbekitError(
                f"probe.labels {table.path} has a column {column!r}, but probe.roles labels messages"
            )
    picked, start, stop = [], [], []
    known: dict[str, None] = {}
    silent, without = 0, 0
    for number, row in enumerate(rows):
        chat = corpus.texts[int(document[row])]
        known.update(dict.fromkeys(message["role"] for message in chat.messages or ()))
        messages = [message for message in chat.messages or () if message["role"] in roles]
        without += not messages
        spans = token_spans(corpus.folder, chat, corpus.separator) if messages else np.zeros((0, 2))
        for message in messages:
            inside = tokens_of(spans, message["start"], message["end"])
            if message["start"] < 0 or not len(inside):
                silent += 1
                continue
            first = corpus.document_tokens[document[row]] + 1
            picked.append(number)
            start.append(first + inside[0])
            stop.append(first + inside[-1] + 1)
    if not known:
        raise ProbekitError(
            f"probe.roles is {', '.join(roles)}, but the texts of the corpus are no chats; unset it, or "
            "give a column of lists of messages by --text"
        )
    if missing := [role for role in roles if role not in known]:
        raise ProbekitError(f"probe.roles has {missing[0]!r}, but the chats have {', '.join(known)}")
    if not picked:
        raise ProbekitError(f"probe.roles is {', '.join(roles)}, but none of these messages says anything")
    left_out = {
        f"{silent:,} messages that say nothing, or not all of what they say is in the chat template": silent,
        f"{without:,} of {len(rows):,} chats, which have no such message": without,
    }
    lines = [f"messages of {', '.join(roles)}: {len(picked):,} in {len({*picked}):,} chats"]
    lines += [f"left out: {line}" for line, count in left_out.items() if count]
    return np.array(picked, np.int64), np.array(start, np.int64), np.array(stop, np.int64), tuple(lines)


def _second(
    corpus: Corpus, table: LabelTable, rows: np.ndarray, document: np.ndarray, sentence: np.ndarray
) -> np.ndarray | None:
    """First token of the other span of each row's pair, and the token after its last one `[rows, 2]`."""
    first, second = (table.numbers(column)[rows] >= 0 for column in ("start", "start2"))
    if not (second | (table.numbers("end2")[rows] >= 0)).any():
        return None
    if len(alone := np.flatnonzero(~(first & second))):
        raise ProbekitError(
            f"{table.where[rows[alone[0]]]}: 'start' or 'start2' is empty, but other rows label pairs of "
            "spans; give both in every row"
        )
    return np.stack(_tokens_of(corpus, table, rows, document, sentence, ("start2", "end2")), axis=1)


def _tokens_of(
    corpus: Corpus,
    table: LabelTable,
    rows: np.ndarray,
    document: np.ndarray,
    sentence: np.ndarray,
    columns: tuple[str, str] = ("start", "end"),
) -> tuple[np.ndarray, np.ndarray]:
    """The first token that each row labels, and the token after the last one `[rows]`."""
    in_sentence = sentence != ABSENT
    start = np.where(in_sentence, corpus.first_token[sentence], corpus.document_tokens[document] + 1)
    stop = np.where(in_sentence, corpus.stops(sentence), corpus.document_tokens[document + 1])
    begin, end = (table.numbers(column)[rows] for column in columns)
    first, last = columns
    if len(alone := np.flatnonzero((begin < 0) & (end >= 0))):
        raise ProbekitError(
            f"{table.where[rows[alone[0]]]}: {last!r} is {end[alone[0]]}, but {first!r} is empty; give both, "
            "or neither to label the whole text or sentence"
        )
    for number in np.unique(document[begin >= 0]):
        own_document = corpus.texts[int(number)]
        if own_document.messages is not None:
            raise ProbekitError(
                f"{table.where[rows[np.argmax((document == number) & (begin >= 0))]]}: {first!r} counts the "
                "characters of a text, and this is a chat; label its messages by probe.roles"
            )
        text = own_document.text
        spans = token_spans(corpus.folder, own_document, corpus.separator)
        for i in np.flatnonzero((document == number) & (begin >= 0)):
            a, b = int(begin[i]), int(end[i]) if end[i] >= 0 else int(begin[i]) + 1
            base, length = 0, len(text)
            if in_sentence[i]:  # characters of the sentence, as it is exported
                own_begin, own_end = corpus.spans[sentence[i]]
                own = text[own_begin:own_end]
                base, length = int(own_begin) + len(own) - len(own.lstrip()), len(own.strip())
            inside = tokens_of(spans, base + a, base + b)
            if not a < b <= length or not len(inside):
                raise ProbekitError(
                    f"{table.where[rows[i]]}: {first!r} {a} and {last!r} {b} must be characters of a text of "
                    f"{length:,}, the end exclusive, and hold a token, not the space before one alone"
                )
            start[i] = corpus.document_tokens[number] + 1 + inside[0]
            stop[i] = corpus.document_tokens[number] + 2 + inside[-1]
    return start, stop


def _distinct(table: LabelTable, rows: np.ndarray, ranges: Ranges) -> tuple[Ranges, np.ndarray]:
    """The labelled ranges of some rows, in the order of the corpus, each once, and the row of each."""
    code, second = ranges.labels, ranges.second
    bounds = np.column_stack([ranges.start, ranges.stop, *(() if second is None else second.T)])
    order = np.lexsort(bounds.T[::-1])
    same = (np.diff(bounds[order], axis=0) == 0).all(axis=1)
    if len(clash := np.flatnonzero(same & (np.diff(code[order]) != 0))):
        one, two = sorted(order[clash[0] : clash[0] + 2].tolist())
        other = table.where[rows[two]].removeprefix(str(table.path)).lstrip(": ")
        first, second = (table.labels[rows[row]] for row in (one, two))
        raise ProbekitError(
            f"{table.where[rows[one]]} and {other} label the same tokens, as {first!r} and as "
            f"{second!r}; keep one of them"
        )
    order = order[np.append(True, ~same)]
    kept = {name: value[order] for name, value in vars(ranges).items() if value is not None}
    return Ranges(**kept), rows[order]


def _described(table: LabelTable, name: str, coded: Coded) -> Iterator[str]:
    """What a user should know of the labels: how many there are, and whether some are odd."""
    labels, names = coded.code, coded.names
    if coded.kind == "numbers":
        yield (
            f"labels in {table.path}: {len(labels):,} numbers of {name!r} from {labels.min():g} to "
            f"{labels.max():g}, mean {labels.mean():g}"
        )
    if coded.vectors is not None:
        count, outputs = coded.vectors.shape
        yield (
            f"labels in {table.path}: {len(labels):,} vectors of {name!r}, {outputs:,} numbers each, "
            f"{count:,} of them different"
        )
    if coded.kind != "classes":
        return
    counts = np.bincount(labels, minlength=len(names))
    frequent = np.argsort(-counts, kind="stable")[:SHOWN_CLASSES]
    shown = ", ".join(f"{names[int(n)]} {counts[n]:,}" for n in frequent)
    more = f", and {len(names) - len(frequent):,} more" if len(names) > len(frequent) else ""
    yield (
        f"labels in {table.path}: {counts.sum():,} labels, {len(names):,} classes of {name!r}: {shown}{more}"
    )
    if len(names) > SHOWN_CLASSES and all(map(_is_number, names)):
        yield f"whole numbers are taken for classes; --probe.kind numbers reads {name!r} as numbers"
    if line := nearly_two_classes(name, names, counts):
        yield line
    if len(once := [names[n] for n in np.flatnonzero(counts == 1).tolist()]):
        yield (
            f"{len(once):,} of {len(names):,} classes of {name!r} are seen once ({', '.join(once[:5])}"
            f"{', …' if len(once) > 5 else ''}): no probe can be fitted and tested on them"
        )
