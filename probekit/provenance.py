"""Where a run comes from: versions, commit, seeds and machine."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from probekit.config import Config
from probekit.devices import compute_device


def provenance(config: Config) -> dict[str, Any]:
    """Where a run comes from: versions, commit, seeds and machine."""
    packages = ("probekit", "torch", "transformers", "transformer-lens", "datasets", "scikit-learn", "numpy")
    return {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "git_commit": _git_commit(),
        "seeds": {"run": config.seed, "corpus": config.corpus.seed, "planted": config.corpus.planted.seed},
        "device": str(compute_device(config.device)),
        "machine": {
            "processor": platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
        },
    }


def _version(package: str) -> str | None:
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
