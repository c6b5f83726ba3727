"""Where a run comes from: versions, commit, seeds, machine, and digests of the files that it builds on."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from probekit import distributed
from probekit.config import Config

PACKAGES = ("probekit-lm", "torch", "transformers", "transformer-lens", "datasets", "scikit-learn", "numpy")
"""What results depend on."""

WEIGHTS = (".json", ".safetensors", ".bin")
"""Suffixes of the files of a pre-trained LM's folder that decide what it computes."""

READ_WHOLE = 1 << 26
ENDS = 1 << 20
"""Files above 64 MiB are digested by their size and a MiB at either end."""


def provenance(config: Config) -> dict[str, Any]:
    """Where a run comes from: versions, commit, seeds and machine."""
    return {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": installed_versions(),
        "git_commit": _git_commit(),
        "seeds": {"run": config.seed, "corpus": config.corpus.seed, "planted": config.corpus.planted.seed},
        "device": str(distributed.compute_device(config.device)),
        "machine": {
            "processor": platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
            "processes": distributed.count(),
        },
    }


def installed_versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES}


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def lm_digest(folder: str | Path) -> str | None:
    """A digest of a pre-trained LM's files; None where there is no such folder, as for hub names."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        return None
    return digest_of(sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS))


def digest_of(files: Iterable[Path]) -> str:
    """A digest of files in their order, large ones by their ends."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= READ_WHOLE:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(size.to_bytes(8, "big") + file.read(ENDS))
                file.seek(size - ENDS)
                digest.update(file.read(ENDS))
    return digest.hexdigest()[:16]


def _git_commit() -> str | None:
    """The commit of the checkout that this file is in; None where probekit is installed as a package."""
    root = Path(__file__).parents[2]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    answer = subprocess.run(  # noqa: S603 - fixed arguments
        [git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None
