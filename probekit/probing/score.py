"""`probekit score`: what a run's linear probe reads of new texts, at their last tokens or at all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.config import BosRule, Config, Position, user_path
from probekit.data.corpus import WRITERS
from probekit.data.documents import Document
from probekit.data.readers import read_documents, reader_for
from probekit.data.sentences import tokens_of
from probekit.data.special_tokens import bos_rule_of_chats
from probekit.data.tokenizer import decoded
from probekit.errors import ProbekitError
from probekit.io import atomic_path
from probekit.models.bidirectional import closing_id
from probekit.models.locations import BEFORE, hook_name
from probekit.probing.activations import probing_windows
from probekit.probing.arrays import predictions
from probekit.probing.record import read_probe_record
from probekit.probing.results import LINEAR_SOLVERS, Cell, SavedProbes, cells_of, validation_loss
from probekit.probing.texts import (
    Chat,
    activation_at,
    check_reach,
    documents_of,
    encoded_texts,
    end_of,
    read_batches,
    read_up_to,
)
from probekit.progress import Progress
from probekit.run.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score(
    run: Run | str | Path,
    texts: str | Path | Sequence[str | Chat],
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
        texts: The texts or chats, or a file of any format that the readers of a corpus know. Of chats, the
            messages of the roles that the run was probed with (`probe.roles`) are read.
        cell: Name of the probe, as in the run's file of probes: solver|location|layer|position|horizon. None:
            the best one on validation documents.
        layer: The best one of this layer.
        text: Column of the file that holds the texts; None: that of the table that the run was probed with.
        encoding: Encoding of the file; None: that of the run's texts.
        tokens: Read every token of a text, not only the one at the probe's position (of a probe at a number
            of tokens before a sentence: the last one).
        batch_size: Texts read at once.
        out: Also write the table: .csv, .jsonl or .parquet.
        quiet: Show no progress.

    Returns:
        A row for each text, message or token: its number and name, the class predicted and its probability,
        and the probability of every class if there are at most 20; or the number predicted, or those of a
        vector.

    Raises:
        ProbekitError: The run has no such probe, or a text is empty or longer than the LM reads.
    """
    if out is not None and (out := user_path(out)).suffix not in WRITERS:
        raise ProbekitError(f"--out is {str(out)!r}; it must end in {', '.join(WRITERS)}")
    run = Run.at(run)
    record = read_probe_record(run.folder)
    run = run.with_settings({"probe.window": record.config.probe.window})
    seed, chosen = _chosen(run, cell, layer, tokens=tokens)
    probe = SavedProbes(run.folder / "probes", "none", seed)[chosen]
    if record.extent == "pairs":
        raise ProbekitError(
            f"the probes of {run.folder} read pairs of spans, of which new texts have none; label spans "
            "or texts"
        )
    documents = _documents(run, texts, record.config, text, encoding)
    begin = [] if _bos_rule(run, documents[0]) == "none" else [run.corpus.separator]
    encoded = encoded_texts(run.corpus.tokenizer, documents, probing_windows(run)[0] - len(begin))
    ids = [own for own, _ in encoded]
    position: Position = "last"  # of each token's own range
    if tokens:
        ranges = [_every_token(run.corpus.tokenizer, own) for own in ids]
    else:
        position = _read_at(chosen, record.config.probe.anchors)
        ranges = _read_ranges(documents, encoded, record.config.probe.roles, position)
    whose = [*range(len(documents))]
    if (closing := closing_id(run.corpus.tokenizer, run.frozen_lm().config)) is not None:
        ids, ranges, whose = _cut(ids, ranges, position)
        position = end_of(position)
    held: list[Tensor] = []

    def hold(name: str, activation: Tensor, lengths: Tensor) -> None:
        held.append(activation)

    name = hook_name(chosen.location.removesuffix(BEFORE), chosen.layer)
    backend = run.backend_for([name], "none", seed)
    parts = []
    with (
        run.autocast(),
        Progress(quiet=quiet).task("score texts", total=len(ids), unit="texts") as task,
    ):
        for rows in read_batches(backend, [name], ids, begin, batch_size, hold, closing):
            activation = held.pop()
            task.advance(len(rows))
            if not (read := [(number, *part) for number, row in enumerate(rows) for part in ranges[row]]):
                continue
            number, start, stop = torch.tensor([part[:3] for part in read], device=activation.device).T
            own = activation_at(position, activation, number, start + len(begin), stop + len(begin))
            order = [rows[part[0]] for part in read]
            number_of_text = [whose[row] for row in order]
            facts = pd.DataFrame([part[3] for part in read])
            names = [documents[own].name for own in number_of_text]
            part = pd.DataFrame({"text": number_of_text, "name": names})
            with torch.autocast("cpu", enabled=False):  # that is for the LM
                predicted = predictions(probe, own.cpu(), record.classes)
            parts.append(pd.concat([part, facts, predicted], axis=1).set_axis(order))
    table = pd.concat(parts).sort_index(kind="stable").reset_index(drop=True)
    if out is not None:
        path = user_path(out)
        with atomic_path(path) as partial:
            WRITERS[path.suffix](table, partial)
    return table


def _chosen(run: Run, key: str | None, layer: int | None, *, tokens: bool) -> tuple[int, Cell]:
    """The seed and the cell of the LM's own probe that was asked for, else of the best one (of a layer)."""
    rows = run.probes()
    rows = rows[(rows.reader == "probe") & (rows.variant == "none") & rows.solver.isin(LINEAR_SOLVERS)]
    rows = rows.assign(loss=validation_loss(rows)).dropna(subset="loss").sort_values("loss", kind="stable")
    cells = cells_of(rows)
    known = [cell.key for cell in cells]
    if not known:
        raise ProbekitError(
            f"{run.folder} keeps no linear probes of the LM itself; run `probekit probe {run.folder} "
            "--probe.variants none random`"
        )
    if key is not None and not (isinstance(key, str) and key in known):
        raise ProbekitError(f"--cell is {key!r}; the best of {len(known)} probes are {', '.join(known[:3])}")
    number = isinstance(layer, int | np.integer | None) and not isinstance(layer, bool)
    of_layer = [
        n
        for n, cell in enumerate(cells)
        if key in (None, cell.key)
        and number
        and layer in (None, cell.layer)
        and (tokens or key is not None or not _behind_first(cell))
    ]
    if not of_layer:
        layers = ", ".join(map(str, sorted({cell.layer for cell in cells})))
        which = "" if key is None else f", and --cell {key!r}"
        raise ProbekitError(f"--layer is {layer!r}{which}; probes are kept of layers {layers}")
    row = of_layer[0]
    return int(rows.seed.iloc[row]), cells[row]


def _behind_first(cell: Cell) -> bool:
    """Whether a probe reads a token that is counted on from the first one of what is labelled."""
    return isinstance(cell.position, int) and cell.position < 0


def _read_at(cell: Cell, anchors: Literal["start", "token"]) -> Position:
    """Where a probe reads new texts: at the last token, if its position is none of a whole text."""
    if isinstance(cell.position, str):
        return cell.position
    if _behind_first(cell):
        raise ProbekitError(
            f"--cell {cell.key!r} reads a token that is counted from the first one labelled; give a probe at "
            "first, last, last-1 and so on, mean, or before a sentence, or --tokens"
        )
    return "first" if cell.position == 0 and anchors == "start" else "last"


Part = tuple[int, int, dict[str, Any]]
"""The first token that is scored, the token after the last one, and what the table says of them."""


def _every_token(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Part]:
    return [(n, n + 1, {"token": n, "piece": decoded(tokenizer, [own])}) for n, own in enumerate(ids)]


def _read_ranges(
    documents: Sequence[Document],
    encoded: Sequence[tuple[list[int], list[tuple[int, int]]]],
    roles: Sequence[str] | None,
    position: Position,
) -> list[list[Part]]:
    """Of each text all of it, or of a chat each message of some roles; long enough for a position."""
    if roles is None or documents[0].messages is None:
        check_reach(position, [len(ids) for ids, _ in encoded])
        return [[(0, len(ids), {})] for ids, _ in encoded]
    found: list[list[Part]] = []
    for document, (_, characters) in zip(documents, encoded, strict=True):
        found.append([])
        for number, message in enumerate(document.messages or ()):
            inside = tokens_of(characters, message["start"], message["end"])
            if message["role"] in roles and message["start"] >= 0 and len(inside):
                facts = {"message": number, "role": message["role"]}
                found[-1].append((int(inside[0]), int(inside[-1]) + 1, facts))
    if not any(found):
        raise ProbekitError(f"no chat has a message of {', '.join(roles)} that says anything")
    check_reach(position, [stop - start for parts in found for start, stop, _ in parts], "message")
    return found


def _cut(
    ids: Sequence[list[int]], ranges: Sequence[list[Part]], position: Position
) -> tuple[list[list[int]], list[list[Part]], list[int]]:
    """A text of its own for each part, which ends with the last token that is read, and whose it is."""
    found = [
        (own[:end], [(start, end, facts)], number)
        for number, (own, parts) in enumerate(zip(ids, ranges, strict=True))
        for start, stop, facts in parts
        for end in [start + read_up_to(position, stop - start)]
    ]
    texts, parts, whose = zip(*found, strict=True)
    return [*texts], [*parts], [*whose]


def _bos_rule(run: Run, document: Document) -> BosRule:
    """Where the LM reads the separator in texts such as this one."""
    corpus = run.corpus
    if document.messages is not None:
        return bos_rule_of_chats(corpus.tokenizer, corpus.bos_rule, document.text)
    return corpus.bos_rule_of_text(run.config.lm.bos)


def _documents(
    run: Run,
    texts: str | Path | Sequence[str | Chat],
    config: Config,
    column: str | None,
    encoding: str | None,
) -> list[Document]:
    """The texts, of a file that is read as the run's own texts were."""
    tokenizer = run.corpus.tokenizer
    if not isinstance(texts, str | Path):
        if not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) != 1:
            raise ProbekitError(
                f"texts is a {type(texts).__name__}; give a list of texts, or the name of a file"
            )
        return documents_of(tokenizer, [*texts])
    if column is None:
        column = config.probe.text_column or config.corpus.text_column
    own = {"path": str(texts), "text_column": column, "separator": config.corpus.separator}
    own["reader"] = reader_for(Path(texts), config.corpus.reader)
    own["encoding"] = config.corpus.encoding if encoding is None else encoding
    settings = Config().override({f"corpus.{name}": value for name, value in own.items()})
    try:
        return [*read_documents(settings.corpus, tokenizer=tokenizer)]
    except ProbekitError as error:
        said = str(error).replace("--corpus.text_column", "--text").replace("corpus.text_column", "--text")
        raise ProbekitError(said) from None
