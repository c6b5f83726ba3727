"""Passages of fiction by author, of which labels come for free."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from probekit.config import CorpusSettings
from probekit.data.readers import read_records
from probekit.errors import ProbekitError

SPEECH = re.compile(r"[“”\"]")
"""What a sentence with speech in it holds."""


def passages(path: Path, authors: int, each: int, seed: int) -> Iterator[dict[str, Any]]:
    """Draws passages of the authors with most stories, one of each story before a second of any."""
    stories: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    if not path.is_file():
        raise ProbekitError(f"{path}: there is no such file")
    settings = CorpusSettings(reader="jsonl")
    for where, _, passage in read_records(path, settings, lambda _: ["text", "author", "title"]):
        if not isinstance(passage, dict) or not {"text", "author", "title"} <= passage.keys():
            raise ProbekitError(f"{where}: a passage must have text, author and title")
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
