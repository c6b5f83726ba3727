"""Finds models and datasets: a local folder, or a repository on the Hugging Face hub pinned to one commit.

The hub's client retries a dead network for most of a minute, file by file. One short request shows within
seconds whether a name can be loaded, and gives the exact revision that a run then records.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from probekit.errors import ProbekitError

TIMEOUT_SECONDS = 5.0

GGUF = ".gguf"
"""The suffix of files that hold a whole model, its weights quantised."""


@dataclass(frozen=True)
class Source:
    """Where a pre-trained model or a dataset is loaded from.

    Attributes:
        name: Local folder or hub name.
        revision: Commit of the hub repository; None for a local folder.
        local_only: Whether it is read from disk alone: a folder, or the hub's cache when there is no network.
        file: A GGUF file there that holds the model; None: the model is all of it.
    """

    name: str
    revision: str | None
    local_only: bool
    file: str | None = None

    @property
    def path(self) -> Path:
        """The local folder or file."""
        return Path(self.name, self.file or "")

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        found = {"revision": self.revision or "main", "local_files_only": self.local_only}
        return found | ({"gguf_file": self.file} if self.file else {})


def find(
    name: str, *, setting: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model"
) -> Source:
    """Finds a local folder, or asks the hub for the exact revision of a name.

    Args:
        name: Local folder or GGUF file, which win, or hub name.
        setting: The setting that holds the name, for messages.
        revision: Branch, tag or commit on the hub; its main branch if None.
        kind: What kind of repository the name is.

    Raises:
        ProbekitError: The folder does not exist, the hub does not know the name, or the hub cannot be reached
            and its cache does not hold the revision.
    """
    # Path would turn `./name` into `name`, which the hub could know: only `~` is expanded.
    folder = os.path.expanduser(name)  # noqa: PTH111 - see above
    if Path(folder).is_dir():
        return Source(folder, None, local_only=True)
    if kind == "model" and name.endswith(GGUF) and Path(folder).is_file():
        return Source(str(Path(folder).parent), None, local_only=True, file=Path(folder).name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ProbekitError(
            f"{setting} is {name!r}: no such folder{f' or {GGUF} file' if kind == 'model' else ''}"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    request = api.model_info if kind == "model" else api.dataset_info
    try:
        return Source(name, request(name, revision=revision, timeout=TIMEOUT_SECONDS).sha, local_only=False)
    except HFValidationError:
        raise ProbekitError(
            f"{setting} is {name!r}: neither a folder here nor a name the hub could have"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status != 429:
            raise ProbekitError(
                f"{setting} is {name!r} at revision {revision or 'main'!r}: no folder of that name here, and "
                f"the hub answers {status}; check the spelling, or log in with `hf auth login` if it is "
                "private"
            ) from None
    except Exception:  # noqa: BLE001, S110 - no network shows as one of many errors, of several libraries
        pass
    return Source(name, _cached_commit(name, setting, revision, kind), local_only=True)


def _cached_commit(name: str, setting: str, revision: str | None, kind: str) -> str:
    """The commit in the hub's cache that a revision stands for."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True)).name
    except LocalEntryNotFoundError:
        snapshots = (
            Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots"
        )
        commits = " and ".join(sorted(folder.name for folder in snapshots.glob("*")))
    cached = f"only revision {commits}" if commits else "nothing of it"
    raise ProbekitError(
        f"{setting} is {name!r} at revision {revision or 'main'!r}: no folder of that name here, the Hugging "
        f"Face hub cannot be reached, and its cache holds {cached}; download it where there is a network and "
        "give the folder's path instead"
    )
