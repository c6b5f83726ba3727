"""Chats: what a tokenizer's chat template makes of messages, and where each of them stands in it.

Special tokens that the template writes are the tokenizer's own. What a message says is text, whatever it
spells. Nothing here imports torch, so that the processes that tokenise documents stay small.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from probekit.errors import ProbekitError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Messages = Sequence[Mapping[str, Any]]
"""A chat: the `role` and the `content` of each message and, once it is rendered, its `start` and `end`."""

RESERVED = 0x100000
"""Characters from here on, of the last plane for private use, stand for what no chat may hold."""

_BREAK = chr(RESERVED)
_RESERVED = re.compile("[\U00100000-\U0010ffff]")
_ROLE = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Rendered:
    """A chat as the LM reads it.

    Attributes:
        text: What the template makes of it.
        messages: The messages with the characters `start` to before `end` of what each says, without white
            space around it; both -1 where it says nothing, or the template does not write all of it once.
        special: Begin and end of each special token that the template writes, in characters.
    """

    text: str
    messages: list[dict[str, Any]]
    special: list[list[int]]


def as_chat(value: object, where: str) -> list[dict[str, Any]] | None:
    """The messages of a chat, given as a list or as JSON; None if a value is plain text.

    Args:
        value: What a field holds.
        where: The field, for messages.

    Raises:
        ProbekitError: It is a list, but not of messages with a role and what is said.
    """
    if isinstance(value, str):
        if not value.lstrip().startswith("[") or '"role"' not in value:
            return None
        try:
            value = found = json.loads(value)
        except (ValueError, RecursionError):
            return None
        if not all(isinstance(message, dict) and "role" in message for message in found):
            return None
    if not isinstance(value, list | tuple):
        return None
    if not value:
        raise ProbekitError(f"{where} holds an empty chat; leave it out")
    for number, message in enumerate(value):
        given = message if isinstance(message, Mapping) else {}
        role, content = given.get("role"), given.get("content")
        if not (isinstance(role, str) and _ROLE.fullmatch(role) and isinstance(content, str)):
            raise ProbekitError(
                f"{where}: message {number} of the chat is {repr(message)[:60]}; it must have a 'role' of "
                "one word and a 'content', which is a string"
            )
        if odd := _RESERVED.search(content):
            raise ProbekitError(
                f"{where}: message {number} of the chat holds U+{ord(odd[0]):X}, a character for private use "
                "that is reserved here; take it out"
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def key_of(messages: Messages) -> str:
    """What identifies a chat: its messages as JSON."""
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: The tokenizer; None: that of a new LM, which has no template.

    Raises:
        ProbekitError: It has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is None or not tokenizer.chat_template:
            owner = "a new LM" if tokenizer is None else f"lm.name {tokenizer.name_or_path!r}"
            raise ProbekitError(
                f"the texts are chats, but the tokenizer of {owner} has no chat template; give an LM that "
                "was tuned on chats, or plain texts"
            )
        self._tokenizer = tokenizer
        strings = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        longest_first = sorted(map(re.escape, strings), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) or "(?!)")

    def render(self, messages: Messages, where: str) -> Rendered:
        """Writes out a chat, and finds its messages and the special tokens of the template.

        Args:
            messages: The chat, as from `as_chat`.
            where: Where it is from, for messages.

        Raises:
            ProbekitError: The template refuses the chat, or writes other words where they are marked.
        """
        text = self._written(messages, where)
        contents = [self._marked(message["content"], number) for number, message in enumerate(messages)]
        marked = self._written(
            [dict(message, content=content) for message, content in zip(messages, contents, strict=True)],
            where,
        )
        if _RESERVED.sub("", marked) != text:
            raise ProbekitError(
                f"{where}: the chat template of {self._tokenizer.name_or_path!r} chooses by what messages "
                "begin or end with, so where each one stands cannot be found; leave this chat out"
            )
        marks = [mark.start() for mark in _RESERVED.finditer(marked)]

        def place(mark: str) -> int:
            at = marked.find(mark)
            return at - bisect_left(marks, at)

        found = []
        for number, message in enumerate(messages):
            bounds = _bounds(number)
            whole = all(marked.count(mark) == 1 for mark in bounds)
            start, end = map(place, bounds) if whole else (-1, -1)
            found.append({"role": message["role"], "content": message["content"], "start": start, "end": end})
        special = [
            [at - bisect_left(marks, at) for at in match.span()] for match in self._special.finditer(marked)
        ]
        return Rendered(text, found, special)

    def _written(self, messages: Messages, where: str) -> str:
        try:
            return str(self._tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False))
        except Exception as error:  # noqa: BLE001 - a template may raise any error of Jinja's or of its own
            raise ProbekitError(
                f"{where}: the chat template of {self._tokenizer.name_or_path!r} refuses this chat: "
                f"{one_line(error)[:200]}"
            ) from None

    def _marked(self, content: str, number: int) -> str:
        """What a message says with a mark at each end, inside of the white space that templates cut off."""
        broken = self._special.sub(lambda found: found[0][:1] + _BREAK + found[0][1:], content)
        said = broken.strip()
        start, end = _bounds(number)
        return broken.replace(said, f"{start}{said}{end}", 1) if said else broken


def _bounds(number: int) -> tuple[str, str]:
    """The marks at the beginning and the end of a message."""
    return chr(RESERVED + 1 + 2 * number), chr(RESERVED + 2 + 2 * number)


class ChatEncoder:
    """Encodes rendered chats: special tokens where the template wrote them, and text everywhere else.

    In the text, characters that no chat holds stand for the template's special tokens, so that the same
    strings in messages are told apart from them.

    Args:
        tokenizer: The tokenizer; it is changed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        special = {number: token for number, token in added.items() if token.special}
        self._stand_in = {
            token.content: chr(RESERVED + number) * len(token.content)
            for number, token in enumerate(special.values())
        }
        copied = ("single_word", "lstrip", "rstrip", "normalized")
        tokenizer.add_tokens(
            [
                AddedToken(self._stand_in[token.content], **{name: getattr(token, name) for name in copied})
                for token in special.values()
            ]
        )
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._meant = {
            tokenizer.token_to_id(self._stand_in[token.content]): own for own, token in special.items()
        }

    def encode(
        self, text: str, special: Sequence[Sequence[int]], separator: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of a chat, without a separator that the template writes before it, and their characters.

        Args:
            text: The chat, rendered.
            special: Where its special tokens begin and end.
            separator: The token that is put before every document.
        """
        parts, at = [], 0
        for start, end in special:
            parts += [text[at:start], self._stand_in[text[start:end]]]
            at = end
        encoding = self._tokenizer.encode("".join([*parts, text[at:]]), add_special_tokens=False)
        ids = [self._meant.get(found, found) for found in encoding.ids]
        first = int(ids[:1] == [separator])
        return ids[first:], encoding.offsets[first:]
