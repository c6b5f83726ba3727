"""Growing texts: the same logits with and without keys and values kept, whatever else is read with them."""

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from probekit.config import BosRule, ConditioningSettings
from probekit.data.corpus import Corpus
from probekit.data.windows import cut_windows, input_tokens
from probekit.models.backends import BridgeBackend
from probekit.models.conditioning import new_adapter
from probekit.models.decoding import Decoder, GrowingText, HFDecoder, new_decoder, read_windows, window_start
from probekit.models.frozen_lm import FrozenLM
from probekit.models.planned_lm import PlannedLM

FAMILIES = ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen2", "qwen3"]
WINDOW = 12


def conditioned(lm: FrozenLM, **settings: object) -> tuple[PlannedLM, Decoder, Decoder]:
    """A conditioned LM whose actions matter, its fastest decoder, and the one that reads everything again."""
    adapter = new_adapter(ConditioningSettings(**{"skip_layers": 1, **settings}), codebook(), lm, seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter *= 5
    model = PlannedLM(BridgeBackend(lm.bridged), None, adapter, 1.0).eval()
    return (
        model,
        new_decoder(model, lm.backend_for(adapter.names), WINDOW),
        Decoder(model, WINDOW),
    )


def codebook() -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def new_texts(lengths: list[int], seed: int = 0) -> list[GrowingText]:
    rng = np.random.default_rng(seed)
    rows = list(codebook())
    return [
        GrowingText(rng.integers(1, 200, n).tolist(), rng.integers(5, size=n).tolist(), rows) for n in lengths
    ]


def grow(texts: list[GrowingText], rng: np.random.Generator) -> None:
    for text in texts:
        text.tokens.append(int(rng.integers(1, 200)))
        text.carried.append(int(rng.integers(5)))


@torch.no_grad()
def assert_same(fast: Decoder, slow: Decoder, texts: list[GrowingText]) -> None:
    torch.testing.assert_close(fast(texts), slow(texts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_keys_and_values_change_nothing(family: str, base: Callable[[str], FrozenLM]):
    """Texts of all lengths grow through two slides of the window, some end, others come."""
    _, fast, slow = conditioned(base(family))
    assert isinstance(fast, HFDecoder)
    assert fast.cached
    rng = np.random.default_rng(1)
    texts = new_texts([1, 4, 11, 12, 30])
    for step in range(2 * WINDOW):
        assert_same(fast, slow, texts)
        grow(texts, rng)
        if step == 3:
            texts = texts[:1] + texts[2:]
        if step == 5:
            texts = new_texts([7, 2], seed=9) + texts
        if step == 7:
            texts = texts[::-1]
        if step == 9:
            grow(texts[:1], rng)  # two tokens at once


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nothing_is_conditioned_without_an_adapter(family: str, base: Callable[[str], FrozenLM]):
    lm = base(family)
    model = PlannedLM(BridgeBackend(lm.bridged), None, None, 1.0)
    fast = new_decoder(model, lm.backend_for(["ln_final.hook_out"]), WINDOW)
    assert fast.cached
    texts = [GrowingText(text.tokens, [0] * len(text.tokens), []) for text in new_texts([3, 9])]
    rng = np.random.default_rng(0)
    for _ in range(6):
        assert_same(fast, Decoder(model, WINDOW), texts)
        with torch.no_grad():
            expected = lm.plain(torch.tensor([texts[0].tokens])).logits[0, -1]
            torch.testing.assert_close(fast(texts)[0], expected, rtol=1e-4, atol=1e-4)
        grow(texts, rng)


@pytest.mark.parametrize("kind", ["adapter", "embedding"])
def test_what_a_position_carries_matters(kind: str, base: Callable[[str], FrozenLM]):
    _, fast, slow = conditioned(base("gpt2"), kind=kind)
    assert fast.cached
    for place in range(4):
        texts = new_texts([4])
        with torch.no_grad():
            before = fast(texts)
            texts[0].carried[place] = (texts[0].carried[place] + 1) % 5
            texts = [GrowingText(**vars(texts[0]))]
            assert not torch.allclose(fast(texts), before, atol=1e-3)
        assert_same(fast, slow, texts)


def test_one_token_is_read_where_the_text_goes_on(base: Callable[[str], FrozenLM]):
    lm = base("gpt2")
    _, fast, _ = conditioned(lm)
    read: list[tuple[int, ...]] = []
    handle = lm.plain.transformer.wte.register_forward_hook(
        lambda _, inputs, __: read.append(inputs[0].shape)
    )
    texts, rng = new_texts([5, WINDOW - 1]), np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(4):
            fast(texts)
            grow(texts, rng)
    handle.remove()
    # The longer one fills the window with its second token, and is read again from its last half.
    assert read == [(2, 11), (2, 1), (1, 1), (1, 7), (2, 1)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_planning_tokens_are_read_by_the_plain_module(family: str, base: Callable[[str], FrozenLM]):
    """With logits for the last slot alone; nothing is kept."""
    lm = base(family)
    _, fast, slow = conditioned(lm, kind="token")
    assert isinstance(fast, HFDecoder)
    assert not fast.cached
    rows: list[tuple[int, ...]] = []
    handle = lm.plain.get_output_embeddings().register_forward_hook(
        lambda _, inputs, __: rows.append(inputs[0].shape[:2])
    )
    rng, texts = np.random.default_rng(1), new_texts([1, 4, 11, 12, 30])
    for _ in range(WINDOW):
        assert_same(fast, slow, texts)
        grow(texts, rng)
    handle.remove()
    assert {*rows} == {(5, 1)}


def test_where_the_plain_module_cannot_the_bridge_reads(base: Callable[[str], FrozenLM]):
    _, found, _ = conditioned(base("gpt2"), location="attn.hook_q")
    assert type(found) is Decoder
    texts = new_texts([3, 8])
    with torch.no_grad():
        together = found(texts)
        alone = torch.cat([found([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_no_use_is_found_out(
    base: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch
):
    """A module that forgets what it was given is read whole, but not by the bridge."""
    lm = base("gpt2")
    forward = lm.plain.forward

    def forgetful(past_key_values: DynamicCache | None = None, **rest: object) -> object:
        if past_key_values is not None and past_key_values.get_seq_length():
            past_key_values, rest["attention_mask"] = None, None
        return forward(past_key_values=past_key_values, **rest)

    monkeypatch.setattr(lm.plain, "forward", forgetful)
    _, found, slow = conditioned(lm)
    assert isinstance(found, HFDecoder)
    assert not found.cached
    assert_same(found, slow, new_texts([3, 20]))


@pytest.mark.parametrize("bos", get_args(BosRule))
@pytest.mark.parametrize("window", [2, 3, 4, 7, 12])
def test_windows_are_those_of_an_evaluation_by_half_a_window(
    window: int, bos: BosRule, make_corpus: Callable[..., Corpus]
):
    """A token is predicted from what it is scored on in windows that advance by half their length."""
    corpus = make_corpus([[40]])
    corpus.facts["bos"] = bos
    text = corpus.tokens.tolist()
    windows = cut_windows(corpus, np.array([0]), window, window - window // 2)
    windows = windows[:-1]  # the last one of a document goes back, to be full
    for number, (start, length, scored) in enumerate(
        zip(windows.start, windows.length, windows.scored, strict=True)
    ):
        for read in range(start + length - scored + 1, start + length + 1):
            assert window_start(int(read), window, bos) == start
            grown = [GrowingText(text[:read], [], [])]
            expected = input_tokens(corpus, windows[number : number + 1])[:, : read - start]
            assert torch.equal(read_windows(grown, window, expected.device, bos).tokens, expected)


@pytest.mark.parametrize("bos", ["every-window", "none"])
def test_kept_keys_and_values_change_nothing_wherever_the_separator_is_read(
    bos: BosRule, base: Callable[[str], FrozenLM]
):
    lm = base("llama")
    model = PlannedLM(BridgeBackend(lm.bridged), None, None, 1.0)
    fast = new_decoder(model, lm.backend_for(["ln_final.hook_out"]), WINDOW, bos)
    assert fast.cached
    texts, rng = new_texts([1, 4, 11, 30]), np.random.default_rng(1)
    for _ in range(2 * WINDOW):
        assert_same(fast, Decoder(model, WINDOW, bos), texts)
        grow(texts, rng)
