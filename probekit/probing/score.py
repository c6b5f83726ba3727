"""`probekit score`: what a run's linear probe reads of new texts, at their last tokens or at all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.config import Config, ProbedName, user_path
from probekit.data.readers import read_documents
from probekit.distributed import autocast
from probekit.errors import ProbekitError
from probekit.io import atomic_path, write_table
from probekit.models.locations import BEFORE, hook_name
from probekit.models.replanning import decoded
from probekit.probing.activations import probing_windows
from probekit.probing.arrays import predictions
from probekit.probing.results import (
    LINEAR_SOLVERS,
    Cell,
    SavedProbes,
    cells_of,
    read_probe_record,
    validation_loss,
)
from probekit.probing.texts import activation_at, check_reach, encoded_texts, read_batches
from probekit.progress import Progress
from probekit.run.run import Run

UNCONDITIONED = ("none", "random")
"""Variants that read a text without planned actions."""

FORMATS = (".csv", ".jsonl", ".parquet")
"""Files that a table of predictions is written to."""


def score(
    run: Run | str | Path,
    texts: str | Path | Sequence[str],
    cell: str | None = None,
    *,
    layer: int | None = None,
    text: str | None = None,
    encoding: str | None = None,
    tokens: bool = False,
    batch_size: int = 16,
    out: str | Path | None = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """Applies a linear probe of a run to new texts.

    Args:
        run: The run, which was probed.
        texts: The texts, or a file of any format that the readers of a corpus know.
        cell: Name of the probe, as in the run's file of probes: solver|location|layer|position|horizon. None:
            the best one on validation documents.
        layer: The best one of this layer.
        text: Column of the file that holds the texts; None: that of the table that the run was probed with.
        encoding: Encoding of the file; None: that of the run's texts.
        tokens: Read every token of a text, not only the last (of a probe at a named position: there).
        batch_size: Texts read at once.
        out: Also write the table: .csv, .jsonl or .parquet.
        quiet: Show no progress.

    Returns:
        A row for each text or token: its number and name, the class predicted and its probability, and the
        probability of every class if there are at most 20; or the number predicted, or those of a vector.

    Raises:
        ProbekitError: The run has no such probe, or a text is empty or longer than the LM reads.
    """
    if out is not None and (out := user_path(out)).suffix not in FORMATS:
        raise ProbekitError(f"--out is {str(out)!r}; it must end in {', '.join(FORMATS)}")
    run = Run.at(run)
    record = read_probe_record(run.folder)
    run = run.with_settings({"probe.window": record.config.probe.window})
    variant, seed, chosen = _chosen(run, cell, layer)
    probe = SavedProbes(run.folder / "probes", variant, seed)[chosen]
    if record.classes is None:
        raise ProbekitError(
            f"the probes of {run.folder} are of an earlier version, which kept no names of classes; run "
            f"`probekit probe {run.folder}` again"
        )
    named = _named(texts, record.config, text, encoding)
    begin = [] if run.corpus.bos_rule == "none" else [run.corpus.separator]
    window = probing_windows(run)[0]
    encoded = encoded_texts(run.corpus.tokenizer, [text for _, text in named], window - len(begin))
    position = chosen.position if isinstance(chosen.position, str) else "last"
    if not tokens:
        check_reach(position, encoded)
    found: list[tuple[list[int], Tensor]] = []

    def read(_: str, activation: Tensor, lengths: Tensor) -> None:
        if tokens:
            column = torch.arange(activation.shape[1], device=activation.device)
            own = activation[(column >= len(begin)) & (column < len(begin) + lengths[:, None])]
        else:
            own = activation_at(position, activation, len(begin), lengths)
        found.append(([], own.cpu()))

    name = hook_name(chosen.location.removesuffix(BEFORE), chosen.layer)
    backend = run.backend_for([name], variant, seed)
    with (
        autocast(run.device, run.config.training.precision),
        Progress(quiet=quiet).task("score texts", total=len(named), unit="texts") as task,
    ):
        for rows in read_batches(backend, [name], encoded, begin, batch_size, read):
            found[-1][0].extend(rows)
            task.advance(len(rows))
    parts = []
    for rows, own in found:
        numbers = [row for row in rows for _ in range(len(encoded[row]) if tokens else 1)]
        part = pd.DataFrame({"text": numbers, "name": [named[row][0] for row in numbers]})
        if tokens:
            part["token"] = [number for row in rows for number in range(len(encoded[row]))]
            part["piece"] = [decoded(run.corpus.tokenizer, [t]) for row in rows for t in encoded[row]]
        parts.append(pd.concat([part, predictions(probe, own, record.classes)], axis=1))
    table = pd.concat(parts).sort_values("text", kind="stable", ignore_index=True)
    if out is not None:
        _write(table, user_path(out))
    return table


def _chosen(run: Run, key: str | None, layer: int | None) -> tuple[ProbedName, int, Cell]:
    """The variant, the seed and the cell of the probe that was asked for, else of the best (of a layer)."""
    rows = run.probes()
    rows = rows[
        (rows.reader == "probe") & rows.variant.isin(UNCONDITIONED) & rows.solver.isin(LINEAR_SOLVERS)
    ]
    rows = rows.assign(loss=validation_loss(rows)).dropna(subset="loss").sort_values("loss", kind="stable")
    cells = cells_of(rows)
    known = [cell.key for cell in cells]
    if not known:
        raise ProbekitError(
            f"{run.folder} keeps no linear probes of {' or '.join(UNCONDITIONED)}; "
            f"run `probekit probe {run.folder}`"
        )
    if key is not None and not (isinstance(key, str) and key in known):
        raise ProbekitError(f"--cell is {key!r}; the best of {len(known)} probes are {', '.join(known[:3])}")
    number = isinstance(layer, int | np.integer | None) and not isinstance(layer, bool)
    of_layer = [
        n
        for n, cell in enumerate(cells)
        if key in (None, cell.key) and number and layer in (None, cell.layer)
    ]
    if not of_layer:
        layers = ", ".join(map(str, sorted({cell.layer for cell in cells})))
        which = "" if key is None else f", and --cell {key!r}"
        raise ProbekitError(f"--layer is {layer!r}{which}; probes are kept of layers {layers}")
    row = of_layer[0]
    return rows.variant.iloc[row], int(rows.seed.iloc[row]), cells[row]


def _named(
    texts: str | Path | Sequence[str], config: Config, column: str | None, encoding: str | None
) -> list[tuple[str, str]]:
    """Names and texts, of a file that is read as the run's own texts were."""
    if not isinstance(texts, str | Path):
        if not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) != 1:
            raise ProbekitError(
                f"texts is a {type(texts).__name__}; give a list of texts, or the name of a file"
            )
        return [(str(number), text) for number, text in enumerate(texts)]
    if column is None:
        column = config.probe.text_column or config.corpus.text_column
    own = {"path": str(texts), "text_column": column, "separator": config.corpus.separator}
    own["encoding"] = config.corpus.encoding if encoding is None else encoding
    settings = Config().override({f"corpus.{name}": value for name, value in own.items()})
    return [(document.name, document.text) for document in read_documents(settings.corpus)]


def _write(table: pd.DataFrame, path: Path) -> None:
    if path.suffix == ".parquet":
        write_table(path, table)
        return
    with atomic_path(path) as partial:
        if path.suffix == ".csv":
            table.to_csv(partial, index=False)
        else:
            table.to_json(partial, orient="records", lines=True, force_ascii=False)
