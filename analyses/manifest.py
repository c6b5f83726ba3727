"""A figure as it is kept: the picture, the numbers behind it (CSV), a manifest of how it was made (JSON)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probekit.errors import ProbekitError
from probekit.io import atomic_path, read_json, write_json, write_text
from probekit.run.run import Run

PICTURES = (".png", ".pdf", ".svg")
"""Formats of pictures."""


def save_figure(
    figure: Figure,
    numbers: pd.DataFrame,
    path: str | Path,
    *,
    script: str,
    settings: dict[str, Any],
    runs: Sequence[Run],
) -> Path:
    """Writes `path` (a picture), and `.csv` and `.json` of the same name beside it.

    Args:
        figure: The picture.
        numbers: What it shows.
        path: Where, with the picture's suffix.
        script: The script that draws it, from the top of the repository.
        settings: What the script was asked for.
        runs: The runs that it read.

    Returns:
        The picture's path.
    """
    path = Path(path)
    if path.suffix not in PICTURES:
        raise ProbekitError(f"--out is {str(path)!r}; it must end in {', '.join(PICTURES)}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    table = numbers.to_csv(index=False)
    write_text(path.with_suffix(".csv"), table)
    write_json(
        path.with_suffix(".json"),
        {
            "script": script,
            "settings": settings,
            "numbers_sha256": hashlib.sha256(table.encode()).hexdigest(),
            "runs": [_origin(run) for run in runs],
        },
    )
    return path


def _origin(run: Run) -> dict[str, Any]:
    recorded = read_json(run.folder / "provenance.json")
    kept = ("versions", "git_commit", "seeds", "device", "machine")
    config = run.config.model_dump(mode="json")
    for section, name in (("corpus", "path"), ("lm", "name")):
        place = config[section][name]
        if place and Path(place).is_absolute():  # where it was is nobody's business but this machine's
            config[section][name] = Path(place).name
    return {
        "run": run.folder.name,
        "corpus": run.corpus.facts["fingerprint"],
        "config": config,
        **{key: recorded[key] for key in kept},
    }
