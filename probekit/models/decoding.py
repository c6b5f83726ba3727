"""Next-token logits of growing texts: conditioned as in training, with keys and values kept.

What the LM reads of a text is decided by the text's length alone: when the window is full, its last half is
kept and filled up again. So every token is predicted from what it would be evaluated on in windows that
advance by half their length, and keeping keys and values changes nothing but the time, and the rounding.

The plain Hugging Face module does that where it computes what the bridge does (`models.hook_points`).
Where it does not, the bridge reads the whole window again for every token. With planning tokens, which stand
between a text's own, nothing is kept either: a text then grows by one token or by two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from probekit.config import BosRule
from probekit.data.windows import IGNORE, Batch
from probekit.models.backends import Backend, HFBackend, Hook, in_float32, position_arguments, tolerance
from probekit.models.conditioning import Conditioned
from probekit.models.mixing import Precomputed
from probekit.models.planned_lm import PlannedLM

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass(eq=False)
class GrowingText:
    """A text that grows, as the LM reads it.

    Attributes:
        tokens: Ids, the separator first.
        carried: Which of `embeddings` each position carries, position t for token t + 1. There are as many
            as tokens when logits are asked for.
        embeddings: Mixed action embeddings `[dimensions]`; none where nothing is conditioned.
    """

    tokens: list[int]
    carried: list[int]
    embeddings: list[Tensor]


def window_start(length: int, window: int, bos: BosRule = "document") -> int:
    """First of the tokens that are read of a text to predict the one after it.

    Args:
        length: Tokens of the text, the separator included.
        window: Most tokens that are read at once.
        bos: Where the LM reads the separator. If never, it is read where there is nothing else.
    """
    first = int(bos == "none" and length > 1)
    step = window - window // 2
    return first + step * max(0, -(-(length - first - window) // step))


@dataclass(frozen=True)
class GrowingWindows:
    """What is read of some texts, padded at the end, where nothing before it can see.

    Attributes:
        tokens: `[texts, positions]`.
        sentence: For every position, the row of `embeddings` that it carries `[texts, positions]`.
        embeddings: `[sentences, dimensions]`; empty where nothing is conditioned.
        lengths: Tokens of each that are no padding `[texts]`.
    """

    tokens: Tensor
    sentence: Tensor
    embeddings: Tensor
    lengths: Tensor

    def batch(self, targets: Tensor | None = None) -> Batch:
        """The same as a batch, whose mixing is `Precomputed(embeddings)`.

        Args:
            targets: Next tokens, `IGNORE` where not scored `[texts, positions]`; unset: nothing is scored.
        """
        sentences = torch.zeros(len(self.embeddings)).to(self.tokens)
        return Batch(
            tokens=self.tokens,
            targets=torch.full_like(self.tokens, IGNORE) if targets is None else targets,
            document=np.arange(len(self.tokens)),
            context=torch.zeros(0, device=self.tokens.device),
            touched=sentences,
            actions=sentences,
            begins=sentences.bool(),
            sentence=self.sentence,
        )


def read_windows(
    texts: Sequence[GrowingText], window: int, device: torch.device, bos: BosRule = "document"
) -> GrowingWindows:
    """What is read of some texts.

    Args:
        texts: At least one.
        window: Most tokens that are read at once.
        device: Where the tensors are to be.
        bos: Where the LM reads the separator. If in every window, it takes the place of a later one's first
            token.
    """
    starts = [window_start(len(text.tokens), window, bos) for text in texts]
    lengths = np.array([len(text.tokens) for text in texts]) - starts
    places = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1) + np.array(starts)[:, None]
    tokens = np.stack([np.array(text.tokens)[place] for text, place in zip(texts, places, strict=True)])
    if bos == "every-window":
        tokens[:, 0] = [text.tokens[0] for text in texts]
    sentence = np.zeros_like(places)
    embeddings: list[Tensor] = []
    for row, text in enumerate(texts):
        if text.embeddings:
            used, found = np.unique(np.array(text.carried)[places[row]], return_inverse=True)
            sentence[row] = found + len(embeddings)
            embeddings += [text.embeddings[i] for i in used]
    return GrowingWindows(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(sentence).to(device),
        torch.stack(embeddings) if embeddings else torch.zeros(0, device=device),
        torch.from_numpy(lengths).to(device),
    )


MoreHooks = Callable[[Conditioned], list[Hook]]
"""Makes the hooks that change activations beside the adapter, for windows that are about to be read."""


class Decoder:
    """Reads the whole window of every text for every token, as the conditioned LM itself does.

    Args:
        model: The conditioned LM.
        window: Most tokens that are read at once.
        bos: Where the LM reads the separator.
        backend: Runs the LM; unset: the model's own.

    Attributes:
        cached: Whether keys and values of a text are kept until it has grown.
    """

    cached = False

    def __init__(
        self,
        model: PlannedLM,
        window: int,
        bos: BosRule = "document",
        backend: Backend | None = None,
    ) -> None:
        self._model, self._window, self._bos = model, window, bos
        self._backend: Backend = model.backend if backend is None else backend
        self._device = self._backend.device

    def __call__(self, texts: Sequence[GrowingText], more: MoreHooks | None = None) -> Tensor:
        """Logits of the token after each text `[texts, vocabulary]`.

        Args:
            texts: At least one. Those that were given in the call before, and have grown by a token since,
                are recognised by identity.
            more: Makes further hooks, for the texts as they were first given; give the same ones in every
                call, with the same texts in the same order, as long as no window moves.
        """
        read = read_windows(texts, self._window, self._device, self._bos)
        conditioned = self._model.conditioned(read.batch(), Precomputed(read.embeddings))
        hooks = [*conditioned.hooks, *(more(conditioned) if more else ())]
        logits = self._backend.logits(conditioned.tokens, hooks, conditioned.positions)
        if conditioned.slots is not None:
            logits = conditioned.slots.predictions(logits)
        return logits[torch.arange(len(texts), device=self._device), read.lengths - 1]


KeysAndValues = list[tuple[Tensor, Tensor]]
"""Of every layer `[texts, heads, positions, features]`; each text's stand at the end of its row."""


class HFDecoder(Decoder):
    """Reads with the plain module, and keeps what it has read if asked to.

    Args:
        model: Whose adapter conditions it, and whose depth ensemble computes the logits, if there are such.
        window: Most tokens that are read at once.
        backend: The plain module.
        bos: Where the LM reads the separator.
        cache: Keep keys and values of the texts of one call for the next.
    """

    def __init__(
        self,
        model: PlannedLM,
        window: int,
        backend: HFBackend,
        bos: BosRule = "document",
        *,
        cache: bool,
    ) -> None:
        super().__init__(model, window, bos, backend)
        self.cached = cache
        self._backend: HFBackend = backend
        self._adapter = model.adapter
        self._late = [] if model.depth is None else model.depth.hooks()
        self._texts: list[GrowingText] = []
        self._read: list[int] = []
        self._cache: DynamicCache | None = None
        self._carried: list[Tensor] = []
        self._hooks: list[Hook] = []

    def __call__(self, texts: Sequence[GrowingText], more: MoreHooks | None = None) -> Tensor:
        """Logits of the token after each text `[texts, vocabulary]`; see `Decoder`."""
        if not self.cached:
            return self._fill(texts, None, more)
        held = [text for text in self._texts if text in texts and self._goes_on(text)]
        fresh = [text for text in texts if text not in held]
        logits = [self._step(held)] if held else []
        if fresh:
            logits.append(self._begin(held, fresh, more))
        self._texts = held + fresh
        self._read = [len(text.tokens) for text in self._texts]
        return torch.cat(logits)[[self._texts.index(text) for text in texts]]

    def _goes_on(self, text: GrowingText) -> bool:
        """Whether the text has grown by a token since it was read, and is read from where it was."""
        read, length = self._read[self._texts.index(text)], len(text.tokens)
        return length == read + 1 and self._start(length) == self._start(read)

    def _start(self, length: int) -> int:
        return window_start(length, self._window, self._bos)

    def _length(self, text: GrowingText) -> int:
        return len(text.tokens) - self._start(len(text.tokens))

    def _step(self, texts: list[GrowingText]) -> Tensor:
        """Reads the last token of texts that are held; other texts are no longer held then."""
        assert self._cache is not None  # noqa: S101 - texts are held in it
        if len(texts) < len(self._texts):
            self._cache.batch_select_indices(torch.tensor([self._texts.index(text) for text in texts]))
        # Columns of the cache that no text reaches any more are masked, and cut off when texts join.
        width, lengths = self._cache.get_seq_length() + 1, [self._length(text) for text in texts]
        read = torch.tensor(lengths, device=self._device)[:, None]
        mask = (torch.arange(width, device=self._device) >= width - read).long()
        with self._backend.hooked([*self._last_hooks(texts), *self._late]) as model:
            logits = model(
                input_ids=torch.tensor([[text.tokens[-1]] for text in texts], device=self._device),
                position_ids=read - 1,
                attention_mask=mask if min(lengths) < width else None,
                past_key_values=self._cache,
                use_cache=True,
            ).logits[:, -1]
        return in_float32(logits)

    def _last_hooks(self, texts: list[GrowingText]) -> list[Hook]:
        """Hooks for the last position of each text; projected again only when a sentence begins."""
        if self._adapter is None:
            return []
        carried = [text.embeddings[text.carried[-1]] for text in texts]
        same = len(carried) == len(self._carried)
        if not (same and all(new is old for new, old in zip(carried, self._carried, strict=True))):
            rows = torch.arange(len(texts), device=self._device)[:, None]
            self._hooks = self._adapter.hooks(torch.stack(carried), rows)
            self._carried = carried
        return self._hooks

    def _begin(self, held: list[GrowingText], fresh: list[GrowingText], more: MoreHooks | None) -> Tensor:
        """Reads whole windows, and holds them after what is held."""
        from transformers import DynamicCache

        # Without the model's config no layer drops what its own sliding window leaves behind: masks hide it.
        cache = DynamicCache()
        logits = self._fill(fresh, cache, more)
        width = max(map(self._length, [*held, *fresh]))
        layers = _to_the_end(_layers(cache), [self._length(text) for text in fresh], width)
        if held and self._cache is not None:
            layers = [
                (torch.cat([_cut(keys, width), new_keys]), torch.cat([_cut(values, width), new_values]))
                for (keys, values), (new_keys, new_values) in zip(_layers(self._cache), layers, strict=True)
            ]
        self._cache = DynamicCache(layers)
        return logits

    def _fill(
        self, texts: Sequence[GrowingText], cache: DynamicCache | None, more: MoreHooks | None
    ) -> Tensor:
        """Reads whole windows; a cache that is given holds their keys and values then."""
        read = read_windows(texts, self._window, self._device, self._bos)
        conditioned = Conditioned(read.tokens)
        if self._adapter is not None:
            conditioned = self._adapter.conditioned(read.tokens, read.embeddings, read.sentence)
        rows, last = torch.arange(len(texts), device=self._device), read.lengths - 1
        if conditioned.slots is not None:
            last = conditioned.slots.predicting[rows, last]

        def only_last(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            states = inputs[0]
            return (states[rows.to(states.device), last.to(states.device)][:, None], *inputs[1:])

        hooks = [*conditioned.hooks, *self._late, *(more(conditioned) if more else ())]
        with self._backend.hooked(hooks) as model:
            # Logits of whole windows may not fit, and nobody reads them.
            handle = model.get_output_embeddings().register_forward_pre_hook(only_last)
            try:
                found = model(
                    input_ids=conditioned.tokens,
                    past_key_values=cache,
                    use_cache=cache is not None,
                    **position_arguments(conditioned.positions),
                )
            finally:
                handle.remove()
        return in_float32(found.logits[:, -1])


def _layers(cache: DynamicCache) -> KeysAndValues:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _to_the_end(layers: KeysAndValues, lengths: list[int], width: int) -> KeysAndValues:
    """Moves what stands at the beginning of rows to their end, and makes rows `width` long."""
    if min(lengths) == max(lengths) == width:
        return layers
    place = torch.arange(width)[None] - (width - torch.tensor(lengths)[:, None])
    place = place.clamp(min=0)[:, None, :, None]

    def moved(states: Tensor) -> Tensor:
        # Layers may be on several devices.
        return states.gather(2, place.to(states.device).expand(-1, states.shape[1], -1, states.shape[3]))

    return [(moved(keys), moved(values)) for keys, values in layers]


def _cut(states: Tensor, width: int) -> Tensor:
    """The last `width` positions, with zeros before them where there are fewer."""
    return nn.functional.pad(states[:, :, -width:], (0, 0, max(0, width - states.shape[2]), 0))


def new_decoder(
    model: PlannedLM, backend: Backend, window: int, bos: BosRule = "document", *, cache: bool = True
) -> Decoder:
    """The fastest decoder that agrees with the conditioned LM on a few tokens.

    Args:
        model: The conditioned LM.
        backend: How the LM runs the model's hooks (`Run.backend_for`).
        window: Most tokens that are read at once, at least two.
        bos: Where the LM reads the separator.
        cache: Whether to keep what was read; it is not kept where the plain module cannot, nor between
            planning tokens.
    """
    whole = Decoder(model, window, bos, backend)
    if not isinstance(backend, HFBackend):
        return whole
    inserts = model.adapter is not None and model.adapter.inserts
    for kept in (True, False) if cache and not inserts else (False,):
        if _agree(HFDecoder(model, window, backend, bos, cache=kept), whole, model, window):
            return HFDecoder(model, window, backend, bos, cache=kept)
    return whole


def _agree(decoder: Decoder, whole: Decoder, model: PlannedLM, window: int) -> bool:
    """Whether two decoders agree on two texts of different lengths, and when these have grown."""
    vocabulary = model.backend.model.config.get_text_config().vocab_size
    embeddings = [] if model.adapter is None else list(model.adapter.codebook.detach()[:2])
    longer = min(window - 1, 3)
    texts = [
        GrowingText([i % vocabulary for i in range(length)], [i % 2 for i in range(length)], embeddings)
        for length in (longer, max(1, longer - 1))
    ]
    for _ in range(2):
        with torch.no_grad():
            try:
                found = decoder(texts)
            except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError):
                return False  # a module that takes no positions, or keeps something else than keys and values
            expected = whole(texts)
        close = tolerance(model.backend.model.dtype) * expected.abs().max().clamp(min=1e-6)
        if found.shape != expected.shape or (found - expected).abs().max() > close:
            return False
        for text in texts:
            text.tokens.append(len(text.tokens) % vocabulary)
            text.carried.append(0)
    return True
