"""Rows of a Hugging Face dataset: a name on the hub, a folder of files, or one that `save_to_disk` wrote."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from probekit.config import CorpusSettings
from probekit.config.types import TABLE_ENDINGS
from probekit.data import hub
from probekit.errors import ProbekitError, one_line

ALL_SPLITS = "all"
"""The setting `corpus.dataset_split` that reads every split of a dataset."""

OF_SPLITS = {"train": "probe", "valid": "validation", "val": "validation", "dev": "validation"}
"""Splits of datasets that have another name here: probes are fitted on what a dataset calls `train`."""


def is_dataset(path: str) -> bool:
    """Whether a table of labels is a dataset: a folder, or a name that may be on the hub."""
    return os.path.isdir(path) or not (os.path.exists(path) or path.endswith(TABLE_ENDINGS))  # noqa: PTH110, PTH112


def records(
    name: str, settings: CorpusSettings, choose: Callable[[Sequence[str]], Sequence[str]], setting: str
) -> Iterator[tuple[str, int, object]]:
    """Streams the rows of a dataset.

    Args:
        name: Its name on the hub, or its folder.
        settings: `subset` and `dataset_split`.
        choose: Chooses the columns that are read, or refuses the dataset.
        setting: The setting that holds the name, for messages.

    Yields:
        Where each row is, its number from 1, and its values by column.

    Raises:
        ProbekitError: There is no such dataset, or the library datasets cannot read it.
    """
    try:
        rows = itertools.chain.from_iterable(_parts(name, settings, choose, setting))
        yield from ((f"{name}:{row}", row, record) for row, record in enumerate(rows, 1))
    except (ProbekitError, MemoryError):
        raise
    except Exception as error:  # datasets passes on the errors of every library that it reads with
        raise ProbekitError(
            f"{setting} is {name!r}: the library datasets cannot read corpus.dataset_split "
            f"{settings.dataset_split!r} of corpus.subset {settings.subset!r}: {one_line(error)}"
        ) from error


def _parts(
    path: str, settings: CorpusSettings, choose: Callable[[Sequence[str]], Sequence[str]], setting: str
) -> Iterator[Iterable[dict[str, Any]]]:
    """The rows of the split that is read, or of all splits, streamed from the hub or from a folder."""
    import datasets  # it takes a second, and no other reader needs it
    from huggingface_hub import snapshot_download

    source = hub.find(path, setting=setting, kind="dataset")
    if source.local_only and source.revision:
        path = snapshot_download(path, repo_type="dataset", revision=source.revision, local_files_only=True)
    split = None if settings.dataset_split == ALL_SPLITS else settings.dataset_split
    if any((Path(path) / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        found = datasets.load_from_disk(path)
        if isinstance(found, dict) and split is not None:
            if split not in found:
                raise ProbekitError(f"corpus.dataset_split is {split!r}, but {path} has {', '.join(found)}")
            found = found[split]
    else:
        revision = None if source.local_only else source.revision
        found = datasets.load_dataset(path, settings.subset, split=split, revision=revision, streaming=True)
    for name, part in found.items() if isinstance(found, dict) else [(None, found)]:
        if part.column_names:  # unknown before the first row in some formats
            own = [] if name is None else ["split"]
            columns = choose([*dict.fromkeys([*part.column_names, *own])])
            part = part.select_columns([column for column in columns if column in part.column_names])
        own_split = {} if name is None else {"split": OF_SPLITS.get(name, name)}
        yield part if name is None else (own_split | row for row in part)
