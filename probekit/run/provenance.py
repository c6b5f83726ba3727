"""Where a run comes from: versions, commit, seeds, machine, and what settings come to there."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from probekit import distributed
from probekit.config import Config
from probekit.distributed import compute_device, precision_of

WEIGHTS = (".json", ".safetensors", ".bin")
"""Files of a pre-trained LM's folder that say what it computes."""


PACKAGES = ("probekit", "torch", "transformers", "transformer-lens", "datasets", "scikit-learn", "numpy")
"""What results depend on."""


def provenance(config: Config) -> dict[str, Any]:
    """Where a run comes from: versions, commit, seeds and machine."""
    return {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": installed_versions(),
        "git_commit": _git_commit(),
        "seeds": {"run": config.seed, "corpus": config.corpus.seed, "planted": config.corpus.planted.seed},
        "device": str(compute_device(config.device)),
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


def come_to(config: Config) -> dict[str, str]:
    """What settings whose value does not tell all come to, here and now, by dotted name."""
    found = {
        "training.precision": precision_of(compute_device(config.device), config.training.precision),
    }
    if config.lm.name is not None and (weights := lm_digest(config.lm.name)):
        found["lm.name"] = weights
    return found


def lm_digest(folder: str | Path) -> str | None:
    """A digest of a pre-trained LM's files; None where there is no such folder."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
    stats = ((path.resolve(), path.stat()) for path in files)
    return _remembered(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


def digest_of(files: Iterable[Path]) -> str:
    """A digest of what files hold, in their order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@cache
def _remembered(files: tuple[tuple[Path, int, int], ...]) -> str:
    """As `digest_of`; files may be large, and the runs of a sweep ask for the same ones."""
    return digest_of(path for path, _, _ in files)


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that this file is in; None where probekit is installed as a package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    git = shutil.which("git")
    if git is None:
        return None
    answer = subprocess.run(  # noqa: S603 - fixed arguments
        [git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None
