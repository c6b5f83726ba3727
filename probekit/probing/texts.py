"""Activations of texts in an LM that the user holds: a Hugging Face model, or TransformerLens's bridge.

    activations = probekit.activations(model, tokenizer, texts)

A text may be a chat, a list of messages that the tokenizer's chat template writes out. The LM is left as it
was. Texts are read as the package reads documents, with a beginning-of-sequence token where the LM was
trained with one, and without padding before them. A bidirectional LM reads them up to the position.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from probekit.config import Position, before_last
from probekit.data.chats import ChatEncoder, ChatTemplate, as_chat
from probekit.data.documents import Document
from probekit.data.special_tokens import bos_rule_for, bos_rule_of_chats, separator_id
from probekit.data.tokenizer import encoded
from probekit.data.windows import close_texts
from probekit.errors import ProbekitError
from probekit.models.backends import Backend, BridgeBackend, HFBackend, ModuleHook
from probekit.models.bidirectional import closing_id, is_bidirectional
from probekit.models.hook_points import architecture_of
from probekit.models.language_model import longest_window
from probekit.models.locations import at_layers, hook_name
from probekit.models.pretrained import HALF, cpu_has_bfloat16, dtype_name
from probekit.probing.activations import HookPoint
from probekit.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Chat = Sequence[Mapping[str, str]]
"""Messages, each with a `role` and a `content`."""


@dataclass(frozen=True)
class TextActivations:
    """One activation of every text at every layer; `numpy.asarray` gives the values, too.

    Attributes:
        values: The activations, [locations * layers, texts, width], on the CPU.
        points: Location and layer of each row of `values`.
        position: Where texts were read, as it was asked for.
        tokens_read: Tokens of each text up to the last one that was read, [texts].
        model: Name of the LM.
        revision: Commit of the LM on the hub, if it is from there.
    """

    values: Tensor
    points: tuple[HookPoint, ...]
    position: Position
    tokens_read: np.ndarray
    model: str
    revision: str | None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of each row of `values`."""
        return tuple(layer for _, layer in self.points)

    @property
    def positions(self) -> np.ndarray:
        """The token of each text that was read, from 0, the last one for a mean [texts]."""
        return self.tokens_read - 1

    def __len__(self) -> int:
        return self.values.shape[1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values as a NumPy array, in float32 where NumPy lacks the dtype."""
        values = self.values.float() if self.values.dtype == torch.bfloat16 else self.values
        return np.array(values.numpy(), dtype=dtype, copy=copy)


def activations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str | Chat],
    layers: int | Sequence[int] | None = None,
    location: str | Sequence[str] = "hook_resid_post",
    position: Position = "last",
    *,
    batch_size: int = 16,
    truncate: bool = False,
    quiet: bool = False,
) -> TextActivations:
    """Reads texts with an LM, and keeps one activation of each at every layer.

    Args:
        model: A causal or bidirectional LM of Hugging Face, such as the tower of a sentence encoder, or a
            TransformerBridge; it is run where it is.
        tokenizer: Its tokenizer; None: the one that a bridge holds.
        texts: The texts, or chats.
        layers: The layers to read; None: all.
        location: TransformerLens hook without the layer, or several of one width.
        position: `last`, `last-1` (the token before the last) and so on, `first`, or `mean` (over the tokens
            of the text). A bidirectional LM reads nothing behind it.
        batch_size: Texts read at once.
        truncate: Read only the beginning of a text that is longer than the LM reads.
        quiet: Show no progress.

    Raises:
        ProbekitError: The model, a layer, a location, a text or the position is not usable; it names it.
    """
    bridged = hasattr(model, "original_model")
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    tower = is_bidirectional(getattr(model, "config", None))  # which needs no head
    readable = bridged or tower or getattr(model, "base_model", model) is not model
    if not readable or not hasattr(tokenizer, "init_kwargs"):
        raise ProbekitError(
            f"model is a {type(model).__name__}, tokenizer a {type(tokenizer).__name__}; give an LM of "
            "Hugging Face or a TransformerBridge, and its tokenizer"
        )
    if position not in ("first", "mean") and before_last(position) is None:
        raise ProbekitError(
            f"position is {position!r}; it must be first, mean, last, last-1 (the token before the last), "
            "and so on"
        )
    plain = model.original_model if bridged else model
    config = plain.config.get_text_config()
    points = _points(location, layers, int(config.num_hidden_layers))
    documents = documents_of(tokenizer, texts)
    rule = bos_rule_for(tokenizer, "auto")
    if documents[0].messages is not None:
        rule = bos_rule_of_chats(tokenizer, rule, documents[0].text)
    begin = [] if rule == "none" else [separator_id(tokenizer)]
    longest = longest_window(config)
    tokens = [ids for ids, _ in encoded_texts(tokenizer, documents, longest - len(begin), truncate=truncate)]
    check_reach(position, [len(own) for own in tokens])
    upto = [read_up_to(position, len(own)) for own in tokens]
    at, closing = position, closing_id(tokenizer, config)
    if closing is not None:
        at, tokens = end_of(position), [own[:end] for own, end in zip(tokens, upto, strict=True)]
    if plain.device.type == "cpu" and plain.dtype in HALF and not cpu_has_bfloat16():
        warnings.warn(
            f"this CPU has no units for {dtype_name(plain.dtype)}, in which the model is held: float32 is "
            "faster here by far (model.float(), or dtype=torch.float32 where it is loaded)",
            stacklevel=2,
        )
    names = [hook_name(*point) for point in points]
    with _as_it_was(model):
        backend = _bridge_backend(model, names) if bridged else _plain_backend(model, tokenizer, points)
        values: dict[str, list[Tensor]] = {name: [] for name in names}

        def read(name: str, activation: Tensor, lengths: Tensor) -> None:
            values[name].append(
                activation_at(at, activation, *whole_texts(len(begin), lengths)).to(plain.dtype).cpu()
            )

        with Progress(quiet=quiet).task("read texts", total=len(texts), unit="texts") as task:
            order = []
            for rows in read_batches(backend, names, tokens, begin, batch_size, read, closing):
                order += rows
                task.advance(len(rows))
    widths = {name: part[0].shape[1] for name, part in values.items()}
    if len(set(widths.values())) > 1:
        raise ProbekitError(f"location: widths differ ({widths}); read locations of one width at a time")
    back = torch.from_numpy(np.argsort(order))
    return TextActivations(
        torch.stack([torch.cat(part)[back] for part in values.values()]),
        tuple(points),
        position,
        np.array(upto),
        plain.config.name_or_path,
        getattr(plain.config, "_commit_hash", None),
    )


def documents_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Chat]) -> list[Document]:
    """Texts or chats as documents, whose names are their numbers from 0.

    Raises:
        ProbekitError: There is none, or one is neither a string nor a chat.
    """
    if isinstance(texts, str) or not hasattr(texts, "__len__") or not len(texts):
        raise ProbekitError(f"texts is {texts!r}; give a list of texts, one at least")
    if getattr(texts, "ndim", 1) != 1:
        raise ProbekitError(f"texts is a {type(texts).__name__} of several columns; give a list of texts")
    documents = []
    template: ChatTemplate | None = None
    for number, text in enumerate(texts):
        if isinstance(text, str):
            documents.append(Document(text, str(number)))
        elif (messages := as_chat(text, f"text {number}")) is not None:
            template = template or ChatTemplate(tokenizer)
            documents.append(Document(name=str(number), **vars(template.render(messages, f"text {number}"))))
        else:
            raise ProbekitError(f"text {number} is {text!r}; it must be a string or a list of messages")
        try:
            documents[-1].text.encode()
        except UnicodeEncodeError:
            raise ProbekitError(
                f"text {number} is {text!r}; it must be without halves of surrogate pairs"
            ) from None
    return documents


def encoded_texts(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], most: int, *, truncate: bool = False
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """The tokens of texts, at least one and at most so many; of chats also the characters of each token.

    Raises:
        ProbekitError: A text has no token, or too many and is not to be truncated; it gives the number of the
            first such text, from 0. Or only some are chats.
    """
    if len({document.messages is None for document in documents}) > 1:
        raise ProbekitError("some texts are chats, and some are not; give all of one kind")
    if documents[0].special is None:
        tokens: list[tuple[list[int], list[tuple[int, int]]]] = [
            (encoded(tokenizer, document.text), []) for document in documents
        ]
    else:
        encoder = ChatEncoder(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
        separator = separator_id(tokenizer)
        tokens = [encoder.encode(chat.text, chat.special or (), separator) for chat in documents]
    lengths = [len(own) for own, _ in tokens]
    if empty := [number for number, length in enumerate(lengths) if not length]:
        raise ProbekitError(
            f"text {empty[0]} is empty, as are {len(empty)} of {len(lengths)} texts; leave them out"
        )
    if (long := [number for number, length in enumerate(lengths) if length > most]) and not truncate:
        raise ProbekitError(
            f"text {long[0]} has {lengths[long[0]]:,} tokens, but the LM reads {most:,} of a text; "
            f"{len(long)} of {len(lengths)} texts are that long: shorten them, or give truncate=True"
        )
    return [(own[:most], characters[:most]) for own, characters in tokens]


def check_reach(position: Position, lengths: Sequence[int], what: str = "text") -> None:
    """Refuses texts, or messages, with too few tokens for a position; names the first one, from 0."""
    behind = before_last(position) or 0
    if short := [number for number, length in enumerate(lengths) if length <= behind]:
        raise ProbekitError(
            f"{what} {short[0]} has {lengths[short[0]]} tokens, but position is {position}; "
            f"{len(short)} of {len(lengths)} {what}s are that short"
        )


def read_up_to(position: Position, count: int) -> int:
    """Tokens of a range of so many up to the last one that is read at a position with a name."""
    return 1 if position == "first" else count - (before_last(position) or 0)


def end_of(position: Position) -> Position:
    """Where a position with a name lies in text that is cut behind it."""
    return "mean" if position == "mean" else "last"


def read_batches(
    backend: Backend,
    names: Sequence[str],
    tokens: Sequence[Sequence[int]],
    begin: Sequence[int],
    batch_size: int,
    read: Callable[[str, Tensor, Tensor], None],
    closing: int | None = None,
) -> Iterator[list[int]]:
    """Runs an LM on texts, those of about one length together.

    Args:
        backend: Runs the LM.
        names: Hooks to read.
        tokens: The tokens of each text.
        begin: Tokens read before each text.
        batch_size: Texts read at once.
        read: Called with a hook's name, its activations [batch, positions, width], and the number of each
            text's tokens [batch]; tokens follow on those of `begin`.
        closing: Id of the token that a bidirectional LM reads after each text.

    Yields:
        The numbers of the texts that have been read.
    """
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ProbekitError(f"batch_size is {batch_size!r}; it must be a whole number from 1 on")
    order = sorted(range(len(tokens)), key=lambda number: -len(tokens[number]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [torch.tensor([*begin, *tokens[number]]) for number in rows]
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(backend.device)
        lengths = torch.tensor([len(tokens[number]) for number in rows], device=backend.device)
        mask = None  # padding behind a text changes nothing before it in a causal LM
        if closing is not None:
            padded, mask = close_texts(padded, len(begin) + lengths, closing)

        def hook(name: str, lengths: Tensor = lengths) -> tuple[str, Callable[..., None]]:
            return name, lambda activation, hook=None: read(name, activation.flatten(2), lengths)

        with torch.no_grad():
            backend(padded, [hook(name) for name in names], len(names), mask=mask)
        yield rows


def whole_texts(begin: int, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranges for `activation_at`: all tokens of each text, which follow on `begin` others."""
    first = torch.full_like(lengths, begin)
    return torch.arange(len(lengths), device=lengths.device), first, first + lengths


def activation_at(
    position: Position, activation: Tensor, text: Tensor, start: Tensor, stop: Tensor
) -> Tensor:
    """Of activations [texts, positions, width] that of each range of tokens; see `check_reach`.

    Args:
        position: Where ranges are read.
        activation: The activations.
        text: The text of each range.
        start: Its first token.
        stop: The token after its last one.

    Returns:
        The activations of ranges [ranges, width].
    """
    if position == "mean":
        dtype = torch.promote_types(activation.dtype, torch.float32)  # half precision overflows or rounds
        ranges = torch.stack([text, start, stop], 1).tolist()
        return torch.stack([activation[own, first:end].mean(0, dtype=dtype) for own, first, end in ranges])
    behind = before_last(position)
    return activation[text, start if behind is None else stop - 1 - behind]


def _points(location: str | Sequence[str], layers: int | Sequence[int] | None, depth: int) -> list[HookPoint]:
    """Every location at every layer."""
    given: Any = range(depth) if layers is None else layers
    listed = list(given if hasattr(given, "__iter__") else [given]) or ["none"]
    asked: Any = [n if isinstance(n, int | np.integer) and n is not True else str(n) for n in listed]
    names = [location] if isinstance(location, str) else location
    if not isinstance(names, Sequence) or not names:
        raise ProbekitError(f"location is {names!r}; give TransformerLens hooks, such as hook_resid_post")
    return at_layers(names, asked, depth, "layers")


def _bridge_backend(model: Any, names: Sequence[str]) -> Backend:
    for name in names:
        if name not in model.hook_dict:
            raise ProbekitError(f"location: {type(model).__name__} has no hook {name}")
    return BridgeBackend(model)


def _plain_backend(model: Any, tokenizer: PreTrainedTokenizerBase, points: Sequence[HookPoint]) -> Backend:
    name = model.config.name_or_path or type(model).__name__
    architecture = architecture_of(model.config, tokenizer, name)
    for location, _ in points:
        architecture.check(location, "location")
    modules = architecture.points([hook_name(*point) for point in points])
    if modules is None:
        raise ProbekitError(
            f"location: no module of {type(model).__name__} has {points[0][0]}; give the model as a "
            "TransformerBridge of TransformerLens"
        )
    if model.base_model is model:  # a tower without a head, whose modules have shorter paths
        prefix = f"{model.base_model_prefix}."
        modules = {
            name: ModuleHook(point.module.removeprefix(prefix), point.is_input)
            for name, point in modules.items()
        }
    return HFBackend(model, modules)


@contextmanager
def _as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards a model is in training mode, and its parameters require gradients, as before."""
    training = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, needs in required:
            parameter.requires_grad_(needs)
