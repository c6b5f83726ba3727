"""What took long to build of a corpus, kept to be taken again.

Documents are read every time. What is made of them is found by a digest of all that decides it: their texts,
the settings, tokenizer and encoder, this package's own code, the libraries' versions. So nothing that is kept
is ever stale, wherever the texts come from; what is damaged is told by its checksums, and removed.

PROBEKIT_CACHE/corpora/<digest>/corpus       a corpus without its texts: hard links, where there can be some
PROBEKIT_CACHE/corpora/<digest>/entry.json   checksums of its files, and what the digest is of
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from probekit import storage
from probekit.config import Config
from probekit.corpus.embeddings import encoder_source
from probekit.errors import ProbekitError
from probekit.provenance import digest_of, installed_version
from probekit.storage import atomic_folder, link_or_copy, read_json, write_json

FOLDER = "PROBEKIT_CACHE"
"""The environment variable that says where things are kept; `off`: nowhere."""

SECONDS_WORTH_KEEPING = 10.0
"""What was made sooner is made again."""

_PACKAGES = (
    *("probekit", "numpy", "scipy", "scikit-learn", "sentencex"),
    *("tokenizers", "transformers", "torch", "sentence-transformers"),
)
"""What the bits of a corpus depend on."""
_TEXTS = "documents.arrow"


@dataclass(frozen=True)
class Entry:
    """Where what is made of some documents is kept, or would be.

    Attributes:
        folder: The entry's folder.
        made_from: What its name is a digest of.
    """

    folder: Path
    made_from: dict[str, Any]

    @classmethod
    def of(cls, config: Config, folder: Path, fingerprint: str, device: str) -> Self | None:
        """The entry of a corpus whose documents were read; None where nothing is kept.

        Args:
            config: The settings.
            folder: Where it is being written, with the tokenizer of a pre-trained LM.
            fingerprint: Digest of the documents' texts.
            device: Where a pre-trained sentence encoder computes.
        """
        cache = cache_folder()
        if cache is None:
            return None
        made_from = _made_from(config, folder, device) | {"texts": fingerprint}
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        return cls(cache / "corpora" / digest[:32], made_from)

    def take(self, folder: Path) -> bool:
        """Links or copies what is kept into a folder, if it is there and whole."""
        if not self.folder.is_dir():
            return False
        kept = self.folder / "corpus"
        checksums: dict[str, str] = {}
        try:
            checksums = read_json(self.folder / "entry.json")["checksums"]
            whole = checksums == _checksums(kept)
        except (ProbekitError, OSError, KeyError, TypeError):
            whole = False
        if not whole:
            shutil.rmtree(self.folder, ignore_errors=True)
            return False
        try:
            for name in checksums:
                link_or_copy(kept / name, folder / name)
        except FileNotFoundError:  # another process has just removed it
            for name in checksums:  # what is linked must not be written to
                (folder / name).unlink(missing_ok=True)
            return False
        return True

    def keep(self, folder: Path) -> None:
        """Links or copies a corpus but for its texts into the cache; one that takes nothing is left alone."""
        with suppress(OSError), atomic_folder(self.folder) as partial:
            checksums = _checksums(folder)
            for name in checksums:
                link_or_copy(folder / name, partial / "corpus" / name)
            write_json(partial / "entry.json", {"checksums": checksums, "made_from": self.made_from})


def cache_folder() -> Path | None:
    """Where things are kept between runs; None where nothing is."""
    chosen = os.environ.get(FOLDER)
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "probekit"


def _made_from(config: Config, folder: Path, device: str) -> dict[str, Any]:
    """All that decides what is made of documents, but for their texts."""
    used = {"language", "probe_fraction", "validation_fraction", "test_fraction", "seed"}
    planted = config.corpus.planted.model_dump(mode="json") if config.corpus.reader == "planted" else None
    new = config.lm.name is None
    return {
        "corpus": config.corpus.model_dump(mode="json", include=used) | {"planted": planted},
        "actions": config.actions.model_dump(mode="json"),
        "tokenizer": config.lm.vocabulary if new else _checksums(folder / "tokenizer"),
        "encoder": None if config.actions.encoder == "tfidf" else [_encoder(config.actions.encoder), device],
        "code": digest_of([*sorted(Path(__file__).parent.glob("*.py")), Path(storage.__file__)]),
        "versions": {name: installed_version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _encoder(name: str) -> str | dict[str, str]:
    """What a sentence-transformers model is now: its revision on the hub, or its files."""
    source = encoder_source(name)
    return _checksums(Path(source.name)) if source.revision is None else source.revision


def _checksums(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder, but for documents' texts."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _TEXTS)
    return {path.relative_to(folder).as_posix(): digest_of([path]) for path in files}
