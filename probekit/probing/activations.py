"""Activations: one forward pass reads every hook point at every position, a chunk of documents at a time.

A document is one window if the LM can read it at once, so that every token is read once. Longer ones are cut
into windows that overlap, so that every token is read with some context.

A bidirectional LM would have seen what follows on a position. It reads a window of its own for each position
of each example, which ends there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from probekit import distributed
from probekit.config import Position, ProbedName
from probekit.data.corpus import Corpus, ranges
from probekit.data.windows import Windows, close_texts, collate, cut_windows, input_tokens
from probekit.errors import ProbekitError
from probekit.models.backends import Hook
from probekit.models.bidirectional import closing_id, is_bidirectional
from probekit.models.conditioning import Conditioned
from probekit.models.language_model import longest_window
from probekit.models.locations import BEFORE, hook_name
from probekit.models.mixing import VARIANTS, evaluation_mixing
from probekit.models.pretrained import dtype_name
from probekit.probing.logit_lens import LogitLens
from probekit.probing.targets import Examples
from probekit.run.run import Run

HookPoint = tuple[str, int]
"""A location and a layer."""

LONGEST_WINDOW = 2048
"""Tokens that an LM reads at once if `probe.window` is unset and it has as many positions."""

CONTEXT = 512
"""Tokens that windows of one document overlap by, or half a window where that is less."""

LEAST_FILLED = 0.75
"""Windows of a batch are at least this share of the longest one: the rest is padding."""

CHUNK_EXAMPLES = 4096
"""Most examples read at once by all processes together, so that each has some chunks of them."""

CHUNK_BYTES = defaultdict(lambda: 1 << 31, cpu=1 << 27)
"""Most bytes of activations read at once, by device type."""


@dataclass(frozen=True)
class Stack:
    """Hook points of one width, whose activations are read into one tensor.

    Attributes:
        width: Features at each hook point.
        points: The hook points, in the order of the tensor's first axis.
    """

    width: int
    points: tuple[HookPoint, ...]


Done = Callable[[int], None]
"""Counts tokens, or examples, that have been read."""


Chunk = tuple[slice, list[Tensor]]
"""Rows of examples, and for every stack their activations `[points, positions, chunk, width]`."""


class Activations(ABC):
    """A source of activations: a model, or what was read before.

    Attributes:
        stacks: The hook points.
        dtype: The type of the activations.
        unit: What `size` counts.
    """

    stacks: list[Stack]
    dtype: torch.dtype
    unit = "examples"

    def size(self, examples: Examples) -> int:
        """How much has to be read for the examples, in units."""
        return len(examples)

    @abstractmethod
    def chunks(self, examples: Examples, done: Done = lambda read: None) -> Iterator[Chunk]:
        """Reads this process's share of the examples in order, a chunk at a time.

        Args:
            examples: The examples.
            done: Called with the number of units that have been read since the last call.

        Yields:
            The rows of the chunk, and its activations.
        """


def within_memory(
    points: Sequence[HookPoint], sizes: Sequence[int], memory: float
) -> Iterator[list[HookPoint]]:
    """Hook points in groups, in their order: as many together as stay within a size, and one at least.

    Args:
        points: The hook points.
        sizes: Bytes that each needs.
        memory: Gigabytes for a group.
    """
    group: list[HookPoint] = []
    held = 0
    for point, size in zip(points, sizes, strict=True):
        if group and held + size > memory * 1e9:
            yield group
            group, held = [], 0
        group.append(point)
        held += size
    yield group


def stacks_of(points: Sequence[HookPoint], widths: Mapping[str, int], spans: int = 1) -> list[Stack]:
    """Groups hook points by the width of their location, in order of first appearance.

    Args:
        points: The hook points.
        widths: Width of each location.
        spans: Ranges of an example, whose activations are joined.
    """
    groups: dict[int, list[HookPoint]] = {}
    for point in points:
        groups.setdefault(widths[point[0].removesuffix(BEFORE)], []).append(point)
    return [Stack(spans * width, tuple(group)) for width, group in groups.items()]


def probing_windows(run: Run) -> tuple[int, int, bool]:
    """Window length and stride in tokens, and whether windows end where a probe reads.

    Those of a bidirectional LM do.

    An LM that was trained here has learned nothing of positions after `training.window`. A pre-trained one is
    read with longer windows than an adapter was trained in: adapters know nothing of positions, and all
    variants must be read in the same windows.

    Raises:
        ProbekitError: `probe.window` is longer than the LM reads.
    """
    config = run.frozen_lm().config
    positions = longest_window(config)
    window = run.config.probe.window
    if window is not None and window > positions:
        raise ProbekitError(f"probe.window is {window}, but the LM reads at most {positions} positions")
    if window is None:
        trained = run.config.training.window if run.config.lm.name is None else LONGEST_WINDOW
        window = min(trained, positions)
    return window, max(1, window // 2, window - CONTEXT), is_bidirectional(config)


@dataclass(frozen=True)
class Pieces:
    """Parts of windows that are read, in the order of the windows: arrays `[pieces]`.

    Attributes:
        window: Number of the window.
        begin: Column of its first token, which is the number of tokens before it in the window.
        end: Column after its last token.
        into: Number of the row that it is read into, one for each position of each example.
    """

    window: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    into: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Pieces:
        return Pieces(*(getattr(self, field.name)[rows] for field in fields(self)))

    def of(self, windows: np.ndarray) -> Pieces:
        """Those of some windows, which are then numbered from 0."""
        first, last = (np.searchsorted(self.window, windows, side) for side in ("left", "right"))
        number = np.repeat(np.arange(len(windows)), last - first)
        return replace(self[ranges(first, last)], window=number)


@dataclass(frozen=True)
class Placement:
    """Where examples are read: every token in the first window that reaches it.

    Windows of which nothing is read are left out, and each ends with the last token that is read. If windows
    are cut, there is one for each end of what is read, and nothing in it lies behind that.

    Attributes:
        windows: The windows `[windows]`.
        single: Single tokens; one goes into a flat index of positions and examples.
        summed: Parts of ranges whose mean is read, one for each window that a range reaches into; they are
            added to the sum of their example.
        tokens_read: Tokens that the LM has read by the last one that is read `[positions, examples]`.
    """

    windows: Windows
    single: Pieces
    summed: Pieces
    tokens_read: np.ndarray

    @classmethod
    def of(
        cls,
        corpus: Corpus,
        examples: Examples,
        positions: Sequence[Position],
        window: int,
        stride: int,
        cut: bool = False,
    ) -> Self:
        """Places examples, of pairs both ranges, in windows of at most `window` tokens, `stride` apart."""
        examples = examples.unpaired()
        # The tokens of every position and example, `[positions * examples]`, and the windows that read them.
        bounds = np.array([examples.bounds(position) for position in positions])
        first, last = bounds[:, 0].ravel(), bounds[:, 1].ravel()
        every = cut_windows(corpus, np.unique(examples.document), window, stride, to_end=True)
        ends = every.start + every.length
        first_window, last_window = (np.searchsorted(ends, at, side="right") for at in (first, last))
        # A piece for each of these windows: what an earlier window has read is not read again.
        pieces = last_window - first_window + 1
        whose, number = np.repeat(np.arange(len(first)), pieces), ranges(first_window, last_window + 1)
        begin = np.where(number == first_window[whose], first[whose], ends[number - 1]) - every.start[number]
        end = np.minimum(last[whose] + 1, ends[number]) - every.start[number]
        tokens_read = end[np.cumsum(pieces) - 1].reshape(len(positions), len(examples))
        # Windows are told apart by their numbers, and if they are cut also by their ends.
        keys, row = np.unique(number * (window + 1) + end * cut, return_inverse=True)
        used = keys // (window + 1)
        length = np.zeros(len(used), np.int64)
        np.maximum.at(length, row, end)
        order = np.argsort(row, kind="stable")
        found = Pieces(row, begin, end, whose)[order]
        mean = np.array([position == "mean" for position in positions])[found.into // len(examples)]
        summed = found[mean]
        return cls(
            replace(every[used], length=length, scored=np.zeros_like(length)),
            found[~mean],
            replace(summed, into=summed.into % len(examples)),
            tokens_read,
        )

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return int(self.windows.length.sum())


def batches(length: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Groups windows of about one length, longest first, into batches of about as many tokens each.

    Args:
        length: Length of each window `[windows]`.
        tokens: Most tokens in a batch, padding included; a longer window has a batch of its own.

    Yields:
        The numbers of a batch's windows.
    """
    order = np.argsort(-length, kind="stable")
    decreasing, start = length[order], 0
    while start < len(order):
        longest = decreasing[start]
        like = np.searchsorted(-decreasing, -LEAST_FILLED * longest, side="right")
        stop = min(int(like), start + max(1, tokens // int(longest)))
        yield order[start:stop]
        start = stop


class ActivationReader(Activations):
    """Reads activations of one variant of a run's LM, in the LM's own dtype.

    Args:
        run: The run.
        variant: Whose activations: `none`, a trained variant, or `random` for random weights.
        points: The hook points to read.
        positions: Where examples are read, in the order of the second axis.
        seed: Seed of random weights.
        windows: Length and stride of the windows; unset: `probing_windows`.
        spans: Ranges of an example: 2 if examples are pairs.
    """

    unit = "tokens"

    def __init__(
        self,
        run: Run,
        variant: ProbedName,
        points: Sequence[HookPoint],
        positions: Sequence[Position],
        seed: int = 0,
        windows: tuple[int, int] | tuple[int, int, bool] | None = None,
        spans: int = 1,
    ) -> None:
        self.run, self.variant, self.seed = run, variant, seed
        self.stacks, self.positions = stacks_of(points, run.locations, spans), tuple(positions)
        self._spans = spans
        self.windows = windows or probing_windows(run)
        self._closing = closing_id(run.corpus.tokenizer, run.frozen_lm().config)
        names = [_hook_name(point) for point in points]
        self._model = run.model(variant, names) if variant in VARIANTS else None
        self._corpus = run.corpus_of(variant) if variant in VARIANTS else run.corpus
        self._mixing = evaluation_mixing(variant)
        self._forward = run.backend_for(names, variant, seed) if self._model is None else self._model.backend
        self.dtype = self._forward.model.dtype

    def logit_lens(self, tokens: np.ndarray) -> LogitLens:
        """The variant's own head, for tokens of these ids."""
        return LogitLens.of(self.run.frozen_lm(), self._forward.model, tokens)

    @property
    def chunk_examples(self) -> tuple[int, int]:
        """Most examples in a chunk, and most of one document; see `chunk_slices`."""
        widths = sum(len(stack.points) * stack.width for stack in self.stacks)
        size = len(self.positions) * self.dtype.itemsize + 4 * ("mean" in self.positions)
        fitting = CHUNK_BYTES[self.run.device.type] // (widths * size)
        most = max(1, min(CHUNK_EXAMPLES // distributed.count(), fitting))
        # Every part of a document reads its windows again: a few times at most, whatever that takes.
        return most, max(most, self.windows[0] // 4)

    def place(self, examples: Examples) -> Placement:
        """Where the examples are read."""
        return Placement.of(self.run.corpus, examples, self.positions, *self.windows)

    def size(self, examples: Examples) -> int:
        """How many tokens have to be read for the examples."""
        return self.place(examples).tokens

    def chunks(self, examples: Examples, done: Done = lambda read: None) -> Iterator[Chunk]:
        """Reads this process's share of the examples; see `Activations.chunks`."""
        for rows in distributed.share([*chunk_slices(examples.document, *self.chunk_examples)]):
            yield rows, self.read(examples[rows], done)

    def read(self, examples: Examples, done: Done = lambda tokens: None) -> list[Tensor]:
        """Reads all stacks at some examples.

        Args:
            examples: The examples.
            done: As in `Activations.chunks`.

        Returns:
            For every stack the activations `[points, positions, examples, width]`.

        Raises:
            ProbekitError: An activation is not finite; it names the location and layer.
        """
        if examples.second is not None:
            each = self.read(examples.unpaired(), done)
            return [values.unflatten(2, (-1, 2)).flatten(3) for values in each]
        into, place = self._empty(len(self.positions), len(examples)), self.place(examples)
        sums = self._sums(len(examples) if "mean" in self.positions else 0)
        length, config = place.windows.length, self.run.config
        # As many tokens in a pass as in one of an evaluation, in longer windows.
        for rows in batches(length, config.evaluation.batch_size * config.training.window):
            pieces = place.single.of(rows), place.summed.of(rows)
            self._pass(self._inputs(place.windows[rows]), *pieces, into, sums)
            done(int(length[rows].sum()))
        if "mean" in self.positions:
            tokens = torch.from_numpy(examples.stop - examples.start).to(self.run.device)
            for values, totals in zip(into, sums, strict=True):
                values[:, self.positions.index("mean")] = totals / tokens[:, None]
        for stack, values in zip(self.stacks, into, strict=True):
            check_finite(stack, values, self.run.dtype)
        return into

    def changed_by_conditioning(self) -> set[HookPoint]:
        """The hook points whose activation depends on the action at the first position that can know it."""
        if self._model is None or (adapter := self._model.adapter) is None:
            return set()
        device = self.run.device
        # Two different tokens: if all were the same, attention would read the same wherever it looks.
        tokens = torch.tensor([[0, 1]], device=device)
        conditioned = torch.tensor([[adapter.lag, 1]], device=device)
        nothing = torch.zeros_like(adapter.codebook[0])
        without, added = self._empty(1, 1), self._empty(1, 1)
        second = Pieces(*(np.array([value]) for value in (0, 1, 2, 0)))
        nothing_summed = second[np.array([], np.int64)]
        for action, into in ((nothing, without), (nothing + 1, added)):
            given = adapter.conditioned(tokens, torch.stack([nothing, action]), conditioned)
            self._pass(given, second, nothing_summed, into, self._sums(0))
        return {
            point
            for stack, before, after in zip(self.stacks, without, added, strict=True)
            for point, *values in zip(stack.points, before, after, strict=True)
            if not torch.equal(*values)
        }

    def _inputs(self, batch: Windows) -> Conditioned:
        """The LM's inputs for a batch of windows, with the variant's actions if it is conditioned."""
        if self._model is None:
            tokens, mask = input_tokens(self.run.corpus, batch), None
            if self._closing is not None:
                tokens, mask = close_texts(tokens, torch.from_numpy(batch.length), self._closing)
                mask = mask.to(self.run.device)
            return Conditioned(tokens.to(self.run.device), mask=mask)
        with torch.no_grad():
            return self._model.conditioned(collate(self._corpus, batch).to(self.run.device), self._mixing)

    def _pass(
        self, given: Conditioned, single: Pieces, summed: Pieces, into: list[Tensor], sums: list[Tensor]
    ) -> None:
        """Runs the model once: single tokens go `into` flat indices, ranges are added to sums of examples."""
        device, slots = given.tokens.device, given.slots
        window, column, _, flat = (torch.from_numpy(part).to(device) for part in vars(single).values())
        ranges_of = [torch.from_numpy(part).to(device) for part in vars(summed).values()]
        if slots is not None:
            column = slots.own[window, column]

        def reading(target: Tensor, total: Tensor) -> Any:
            def read(activation: Tensor, hook: Any = None) -> None:
                target.flatten(0, 1)[flat] = activation[window, column].flatten(1).to(target.dtype)
                if len(total):
                    if slots is not None:
                        rows = torch.arange(len(activation), device=device)[:, None]
                        activation = activation[rows, slots.own]
                    _add_ranges(total, activation.flatten(2), *ranges_of)

            return read

        before: list[Hook] = []
        after: list[Hook] = []
        for stack, values, totals in zip(self.stacks, into, sums, strict=True):
            for point, target, total in zip(stack.points, values, totals, strict=True):
                hooks = before if point[0].endswith(BEFORE) else after
                hooks.append((_hook_name(point), reading(target, total)))
        with torch.no_grad(), self.run.autocast():
            hooks = [*before, *given.hooks, *after]
            self._forward(given.tokens, hooks, len(before) + len(after), given.positions, given.mask)

    def _empty(self, positions: int, examples: int) -> list[Tensor]:
        shapes = [(len(s.points), positions, examples, s.width // self._spans) for s in self.stacks]
        return [torch.empty(shape, dtype=self.dtype, device=self.run.device) for shape in shapes]

    def _sums(self, examples: int) -> list[Tensor]:
        """Zeros for sums over the ranges of examples, for every stack `[points, examples, width]`."""
        shapes = [(len(stack.points), examples, stack.width // self._spans) for stack in self.stacks]
        return [torch.zeros(shape, device=self.run.device) for shape in shapes]


def _add_ranges(
    total: Tensor, activation: Tensor, window: Tensor, begin: Tensor, end: Tensor, into: Tensor
) -> None:
    """Adds the sums of ranges of activations [windows, tokens, width] to totals [examples, width]."""
    # From the sums up to every token, so that memory does not depend on how ranges overlap.
    every = activation.double()
    broken = ~every.isfinite().all(2)  # tokens that spoil their own ranges alone
    upto = nn.functional.pad(every.masked_fill_(broken[..., None], 0).cumsum(1), (0, 0, 1, 0))
    wrong = nn.functional.pad(broken.cumsum(1), (1, 0))
    found = (upto[window, end] - upto[window, begin]).float()
    found[wrong[window, end] > wrong[window, begin]] = torch.nan
    total.index_add_(0, into, found)


def chunk_slices(document: np.ndarray, most: int, of_one: int) -> Iterator[slice]:
    """Cuts examples `[examples]` into chunks of whole documents.

    Args:
        document: The document of each example; those of one are together.
        most: Most examples in a chunk of several documents.
        of_one: Most examples in a chunk of one document; one that has more is cut into parts, and the windows
            of two parts may overlap.
    """
    ends = np.append(np.flatnonzero(np.diff(document)) + 1, len(document))
    start = 0
    while start < len(document):
        last = int(np.searchsorted(ends, start + most, side="right")) - 1
        stop = int(ends[last]) if last >= 0 else 0
        if stop <= start:
            stop = min(start + of_one, int(ends[last + 1]))
        yield slice(start, stop)
        start = stop


def check_finite(stack: Stack, values: Tensor, dtype: torch.dtype) -> None:
    """Refuses activations `[points, ...]` that are not all finite, of an LM with weights of a dtype.

    Raises:
        ProbekitError: Names the location and layer.
    """
    advice = "which ends at 65,504; give lm.dtype bfloat16"
    if dtype is not torch.float16:
        advice = "in which none should overflow; look for weights that are not finite in the checkpoint"
    for (location, layer), value in zip(stack.points, values, strict=True):
        # A sum is finite if all is, unless it overflows: only then is a closer look needed.
        if not value.sum().isfinite() and not value.isfinite().all():
            raise ProbekitError(
                f"the activations at {location}, layer {layer}, are not all finite in "
                f"{dtype_name(dtype)}, {advice}"
            )


def _hook_name(point: HookPoint) -> str:
    location, layer = point
    return hook_name(location.removesuffix(BEFORE), layer)
