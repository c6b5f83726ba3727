"""Passages of fiction by author, of which labels come for free."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.config import CorpusSettings
from probekit.data.readers import read_records
from probekit.data.sentences import opening, sentence_spans
from probekit.errors import ProbekitError
from probekit.io import write_text

SPEECH = re.compile(r"[“”\"]")
"""What a sentence with speech in it holds."""

FIRST_HALF = re.compile(r"(?:the |an? )?+[^a-z]*[a-l]", re.IGNORECASE)
PARAGRAPH = re.compile(r"\n\s*$")


def passages(path: Path, authors: int, each: int, seed: int) -> Iterator[dict[str, Any]]:
    """Draws passages of the authors with most stories, one of each story before a second of any."""
    stories: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for passage in _read(path):
        stories[passage["author"]][passage["title"]].append(passage)
    rng = np.random.default_rng(seed)
    most = sorted(stories, key=lambda author: (-len(stories[author]), author))
    for author in [author for author in most if author != "Anonymous"][:authors]:
        drawn = [
            (turn, rng.random(), passage)
            for of_story in stories[author].values()
            for turn, passage in enumerate(rng.permutation(np.array(of_story, dtype=object)))
        ]
        yield from (passage for _, _, passage in sorted(drawn, key=lambda row: row[:2])[:each])


def other_stories(path: Path, drawn: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Draws so many passages of stories, whoever wrote them, of which none is among those that were drawn.

    Raises:
        ProbekitError: There are not so many.
    """
    titles = {passage["title"] for passage in drawn}
    other = [passage for passage in _read(path) if passage["title"] not in titles]
    if len(other) < count:
        raise ProbekitError(f"{path} has {len(other)} passages of other stories; {count} are wanted")
    return [other[number] for number in np.random.default_rng(seed).permutation(len(other))[:count]]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ProbekitError(f"{path}: there is no such file")
    settings = CorpusSettings(reader="jsonl")
    for where, _, passage in read_records(path, settings, lambda _: ["text", "author", "title"]):
        if not isinstance(passage, dict) or not {"text", "author", "title"} <= passage.keys():
            raise ProbekitError(f"{where}: a passage must have text, author and title")
        yield passage


def beginning(passage: dict[str, Any], sentences: int) -> str:
    """The first sentences of a passage."""
    return opening(passage["text"], sentences).rstrip()


def labelled_sentences(passage: dict[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """A row for each sentence of a passage but the last, of which no next sentence is known."""
    text = passage["text"]
    spans = sentence_spans(text)[: most + 1]
    for place, ((start, end), following) in enumerate(pairwise(spans)):
        sentence = text[start:end]
        yield {
            "text": text[: spans[-1][0]].rstrip(),  # all that is read, so that no row knows the next sentence
            "start": start,
            "end": start + len(sentence.rstrip()),
            "story": f"{passage['author']}: {passage['title']}",
            "author": passage["author"],
            "speech": bool(SPEECH.search(sentence)),
            "next speech": bool(SPEECH.search(text[slice(*following)])),
            "next paragraph": bool(PARAGRAPH.search(sentence)),
            "place": place,
            "title": bool(FIRST_HALF.match(passage["title"])),
        }


def save_labels(drawn: Iterable[dict[str, Any]], most: int, folder: Path) -> Path:
    """Writes the labels of the first sentences of passages as a table, `labels.csv` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = folder / "labels.csv"
    rows = [row for passage in drawn for row in labelled_sentences(passage, most)]
    write_text(labels, pd.DataFrame(rows).to_csv(index=False))
    return labels
