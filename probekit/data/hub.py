"""The Hugging Face hub, asked once and briefly before anything is downloaded.

The hub's own client retries a dead network for most of a minute, file by file. One short request tells within
seconds whether a name can be had, and pins the exact revision that a run then records.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from probekit.errors import ProbekitError

TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Source:
    """Where a pre-trained thing is loaded from.

    Attributes:
        name: Local folder or hub name.
        revision: Commit of the hub repository; None for a local folder.
        local_only: Read from disk alone: a folder, or the hub's cache when the network is gone.
    """

    name: str
    revision: str | None
    local_only: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        return {"revision": self.revision or "main", "local_files_only": self.local_only}


def find(
    name: str, *, setting: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model"
) -> Source:
    """Finds a local folder, or asks the hub for the exact revision of a name.

    Raises:
        ProbekitError: The folder does not exist, the hub does not know the name, or it cannot be reached
            and nothing is cached. `setting` is named in the message.
    """
    # A name without ~ stays as it is: Path would make `name`, as on the hub, of `./name`.
    folder = str(Path(name).expanduser()) if name.startswith("~") else name
    if Path(folder).is_dir():
        return Source(folder, None, local_only=True)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ProbekitError(f"{setting} is {name!r}: no such folder")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    try:
        return Source(name, ask(name, revision=revision, timeout=TIMEOUT_SECONDS).sha, local_only=False)
    except HFValidationError:
        raise ProbekitError(
            f"{setting} is {name!r}: neither a folder here nor a name the hub could have"
        ) from None
    except OfflineModeIsEnabled:
        return _cached(name, setting, revision, kind)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status != 429:
            raise ProbekitError(
                f"{setting} is {name!r} at revision {revision or 'main'!r}: no folder of that name here, and "
                f"the hub answers {status}; check the spelling, or log in with `hf auth login` if it is "
                "private"
            ) from None
        return _cached(name, setting, revision, kind)
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        return _cached(name, setting, revision, kind)


def _cached(name: str, setting: str, revision: str | None, kind: str) -> Source:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        repositories = frozenset()
    held = [
        cached
        for repository in repositories
        if repository.repo_id == name and repository.repo_type == kind
        for cached in repository.revisions
    ]
    for cached in held:
        if (revision or "main") in cached.refs or cached.commit_hash == revision:
            return Source(name, cached.commit_hash, local_only=True)
    commits = " and ".join(sorted(cached.commit_hash for cached in held))
    holds = f"only revision {commits}" if held else "nothing of it"
    raise ProbekitError(
        f"{setting} is {name!r} at revision {revision or 'main'!r}: no folder of that name here, the Hugging "
        f"Face hub cannot be reached, and its cache holds {holds}; download it where there is a network and "
        "give the folder's path instead"
    )
