"""Activations against a plain Hugging Face model, run on nothing but the tokens before each position."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.evaluation.perplexity import window_and_stride
from probekit.models.backends import BridgeBackend, HFBackend
from probekit.models.language_model import random_weights
from probekit.models.planned_lm import PlannedLM
from probekit.probing import activations
from probekit.probing.activations import (
    ActivationReader,
    HookPoint,
    Stack,
    check_finite,
    chunk_slices,
    stacks_of,
)
from probekit.probing.targets import Examples, find_examples, find_target, reached
from probekit.run.run import Run
from probekit.training.train import train

LAYERS = 3
WIDTHS = {
    "hook_embed": 32,
    "hook_resid_pre": 32,
    "hook_resid_mid": 32,
    "hook_resid_post": 32,
    "hook_attn_out": 32,
    "hook_mlp_out": 32,
    "attn.hook_z": 32,
    "mlp.hook_post": 128,
    "ln_final.hook_out": 32,
}
"""Locations and the width of each in the tiny LM."""
OUTSIDE = {"hook_embed": 0, "ln_final.hook_out": LAYERS - 1}
PLACES: list[HookPoint] = [
    (location, layer)
    for location in WIDTHS
    for layer in ([OUTSIDE[location]] if location in OUTSIDE else range(LAYERS))
]
BEFORE: HookPoint = ("attn.hook_z:before", 2)
DISTANCES = (1, 2, 5, 17)
DOCUMENTS = np.array([31, 4, 30])


def at_anchors(run: Run, documents: np.ndarray, count: int = 8, far: int = max(DISTANCES)) -> Examples:
    """Some anchors of each document, the first that all distances reach and the last token among them."""
    corpus, rng = run.corpus, np.random.default_rng(0)
    anchors = []
    for document in documents:
        tokens = np.arange(corpus.document_tokens[document] + 1 + far, corpus.document_tokens[document + 1])
        inner = rng.choice(tokens[1:-1], size=count, replace=False)
        anchors.append(np.sort(np.concatenate([tokens[[0, -1]], inner])))
    anchor = np.concatenate(anchors)
    sentence = np.searchsorted(corpus.first_token, anchor, side="right") - 1
    return Examples.of_tokens(
        np.repeat(documents, count + 2), anchor, sentence, np.zeros((len(anchor), 1), np.int64)
    )


def read(reader: ActivationReader, examples: Examples) -> dict[HookPoint, Tensor]:
    """All that a reader reads at each place `[distances, examples, width]`, its chunks put together."""
    parts: dict[HookPoint, list[Tensor]] = {}
    end = 0
    for part, blocks in reader.chunks(examples):
        assert part.start == end
        end = part.stop
        for block, values in zip(reader.stacks, blocks, strict=True):
            assert values.shape == (
                len(block.points), len(reader.positions), part.stop - part.start, block.width
            )  # fmt: skip
            assert values.dtype == torch.float32
            for place, value in zip(block.points, values, strict=True):
                parts.setdefault(place, []).append(value)
    assert end == len(examples)
    return {place: torch.cat(values, dim=1) for place, values in parts.items()}


def settings(run: Run, window: int = 20, stride: int = 7, **more: Any) -> Run:
    return run.with_settings({"evaluation.window": window, "evaluation.stride": stride, **more})


def reader_of(run: Run, *given: Any, **named: Any) -> ActivationReader:
    """A reader with the windows of `settings`."""
    return ActivationReader(run, *given, windows=window_and_stride(run), **named)


def loud(run: Run) -> Run:
    """The run with adapters that cannot be overheard."""
    trained = run.model

    def model(variant: str, hooks: Sequence[str] = ()) -> PlannedLM:
        found = trained(variant, hooks)
        found.adapter.projections.data *= 100
        return found

    run.model = model
    return run


# The slow way


class Watched:
    """A plain GPT-2 whose every place is seen at the last token, with actions added as the paper has it."""

    def __init__(self, run: Run, model: PreTrainedModel, conditioned: PlannedLM | None = None) -> None:
        self._run, self._model, self._conditioned = run, model.eval(), conditioned
        self.seen: dict[HookPoint, Tensor] = {}
        body = model.transformer
        self._see(body.wte, "hook_embed", 0, enters=False)
        self._see(body.ln_f, "ln_final.hook_out", LAYERS - 1, enters=False)
        for layer, block in enumerate(body.h):
            self._see(block, "hook_resid_pre", layer, enters=True)
            self._see(block.ln_2, "hook_resid_mid", layer, enters=True)
            self._see(block, "hook_resid_post", layer, enters=False)
            self._see(block.attn, "hook_attn_out", layer, enters=False)
            self._see(block.mlp, "hook_mlp_out", layer, enters=False)
            self._see(block.mlp.c_proj, "mlp.hook_post", layer, enters=True)
            if layer == BEFORE[1]:
                self._see(block.attn.c_proj, BEFORE[0], layer, enters=True)
                if conditioned:
                    block.attn.c_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] + self._added,))
            self._see(block.attn.c_proj, "attn.hook_z", layer, enters=True)

    def _see(self, module: torch.nn.Module, location: str, layer: int, *, enters: bool) -> None:
        def before(_: object, inputs: tuple[Tensor, ...]) -> None:
            self.seen[location, layer] = inputs[0][0, -1].clone()

        def after(_: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self.seen[location, layer] = (output[0] if isinstance(output, tuple) else output)[0, -1]

        (module.register_forward_pre_hook(before) if enters else module.register_forward_hook(after))

    @torch.no_grad()
    def at(self, position: int, window: int, stride: int) -> dict[HookPoint, Tensor]:
        """All places at a position, in the window that scores its next token, cut off after the position."""
        corpus = self._run.corpus
        document = int(np.searchsorted(corpus.document_tokens, position, side="right")) - 1
        start = int(corpus.document_tokens[document]) + (corpus.bos_rule == "none")
        stop = window
        while stop < position + 1 - start:
            stop += stride
        begin = start + stop - window
        tokens = corpus.tokens[begin : position + 1].astype(np.int64)
        if corpus.bos_rule == "every-window":
            tokens[0] = corpus.separator
            assert len(tokens) > 1, "the token that the separator replaces is read before"
        if self._conditioned is not None:
            self._added = self._actions(document, begin, position)
        self._model(torch.from_numpy(tokens)[None])
        return dict(self.seen)

    def _actions(self, document: int, begin: int, position: int) -> Tensor:
        """What soft mixing adds in the one conditioned layer: a token carries the next one's action."""
        corpus, model = self._run.corpus, self._conditioned
        first, last = corpus.document_sentences[document : document + 2].tolist()
        scores = model.planner(torch.from_numpy(np.array(corpus.embeddings[first:last]))[None])[0]
        mixed = (scores / model.temperature).softmax(dim=1) @ model.adapter.codebook
        holders = [
            max(
                s
                for s in range(first, last)
                if corpus.first_token[s] <= max(token, corpus.first_token[first])
            )
            for token in range(begin + 1, position + 2)
        ]
        return (mixed @ model.adapter.projections[0])[[s - first for s in holders]]


def assert_equal_to_slow(
    found: dict[HookPoint, Tensor], slow: Watched, examples: Examples, window: int, stride: int
) -> None:
    for row, anchor in enumerate(examples.start.tolist()):
        for d, distance in enumerate(DISTANCES):
            expected = slow.at(anchor - distance, window, stride)
            for place, values in found.items():
                torch.testing.assert_close(values[d, row], expected[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("window", "stride", "batch"), [(48, 48, 8), (20, 7, 3), (5, 1, 64), (30, 1, 1)])
def test_every_place_equals_a_pass_over_the_tokens_before(
    tiny_run: Run, window: int, stride: int, batch: int
):
    run = settings(tiny_run, window, stride, **{"evaluation.batch_size": batch})
    examples = at_anchors(run, DOCUMENTS)
    found = read(reader_of(run, "none", PLACES, DISTANCES), examples)
    assert sorted(found) == sorted(PLACES)
    assert_equal_to_slow(found, Watched(run, run.plain_model()), examples, window, stride)


@pytest.mark.parametrize("variant", ["soft", "joint"])
@pytest.mark.parametrize(("window", "stride"), [(48, 24), (20, 7)])
def test_conditioned_variants_equal_adding_each_action_by_hand(
    tiny_run: Run, window: int, stride: int, variant: str
):
    run = loud(settings(tiny_run, window, stride))
    examples = at_anchors(run, DOCUMENTS, count=4)
    found = read(reader_of(run, variant, [*PLACES, BEFORE], DISTANCES), examples)
    slow = Watched(run, run.plain_model(), run.model(variant))
    assert_equal_to_slow(found, slow, examples, window, stride)
    added = found["attn.hook_z", 2] - found[BEFORE]
    assert added.abs().amax(dim=2).min() > 1e-2  # else the comparison would have proved little


def test_random_weights_are_those_of_the_seed(tiny_run: Run):
    run = settings(tiny_run)
    examples = at_anchors(run, DOCUMENTS, count=3)
    found = read(reader_of(run, "random", PLACES, DISTANCES, seed=3), examples)
    assert_equal_to_slow(found, Watched(run, random_weights(run.plain_model().config, 3)), examples, 20, 7)
    other = read(reader_of(run, "random", PLACES, DISTANCES, seed=4), examples)
    trained = read(reader_of(run, "none", PLACES, DISTANCES, seed=3), examples)
    for place, values in found.items():
        for unlike in (other, trained):
            assert (unlike[place] - values).abs().max() > 0.1 * values.abs().max(), place


@pytest.mark.parametrize("variant", ["none", "random", "soft"])
def test_the_bridge_reads_the_same(tiny_run: Run, variant: str, monkeypatch: pytest.MonkeyPatch):
    """A hook that no plain module has makes all of them go through the bridge."""
    run = loud(settings(tiny_run))
    examples = at_anchors(run, DOCUMENTS, count=3)
    places = [*PLACES, BEFORE]
    taken: list[type] = []
    for kind in (HFBackend, BridgeBackend):
        call = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda self, *given, call=call: (taken.append(type(self)), call(self, *given))
        )
    fast = reader_of(run, variant, places, DISTANCES, seed=3)
    slow = reader_of(run, variant, [*places, ("attn.hook_q", 1)], DISTANCES, seed=3)
    taken.clear()
    found = read(fast, examples)
    assert {*taken} == {HFBackend}
    taken.clear()
    expected = read(slow, examples)
    assert {*taken} == {BridgeBackend}
    for place, values in found.items():
        torch.testing.assert_close(values, expected[place], rtol=1e-4, atol=1e-4)


POSITIONS = (17, 1, 0, -2, "first", "last", "mean")


def ranges_of(run: Run, documents: np.ndarray) -> Examples:
    """Every sentence that all positions reach, and the whole of every document, the last token among them."""
    corpus = run.corpus
    found = find_examples(corpus, documents, find_target(corpus, "action"), (1,))
    near = np.all([reached(corpus, found, position) for position in POSITIONS], axis=0)
    found = found[np.flatnonzero(near)]
    whole = replace(
        found,
        start=np.where(found.sentence % 5 == 0, corpus.document_tokens[found.document] + 18, found.start),
        stop=np.where(found.sentence % 5 < 2, corpus.document_tokens[found.document + 1], found.stop),
    )
    assert {*corpus.document_tokens[documents + 1]} <= {*whole.stop}
    return whole


@pytest.mark.parametrize("variant", ["none", "soft"])
@pytest.mark.parametrize("bos", ["document", "every-window", "none"])
@pytest.mark.parametrize(("window", "stride"), [(48, 24), (12, 11), (9, 9)])
def test_every_position_equals_passes_one_by_one(
    tiny_run: Run, window: int, stride: int, bos: str, variant: str
):
    """Also means of ranges in several windows, and a document's last token, which predicts nothing."""
    run = loud(tiny_run.with_settings({"evaluation.batch_size": 3}))
    run.corpus = replace(tiny_run.corpus, facts=tiny_run.corpus.facts | {"bos": bos})
    if bos == "every-window":
        stride = min(stride, window - 1)
    examples, places = (
        ranges_of(run, np.array([4, 31])),
        [("hook_resid_post", 2), ("mlp.hook_post", 1), BEFORE],
    )
    found = read(ActivationReader(run, variant, places, POSITIONS, windows=(window, stride)), examples)
    slow = Watched(run, run.plain_model(), run.model(variant) if variant == "soft" else None)
    seen = cache(lambda token: slow.at(token, window, stride))
    for row in range(0, len(examples), 2):
        for p, position in enumerate(POSITIONS):
            first, last = (int(bound[row]) for bound in examples.bounds(position))
            for place, values in found.items():
                expected = torch.stack([seen(token)[place] for token in range(first, last + 1)]).mean(0)
                torch.testing.assert_close(values[p, row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["none", "soft"])
def test_the_last_token_of_all_is_that_of_a_plain_pass(tiny_run: Run, variant: str):
    corpus = tiny_run.corpus
    begin, sentences = int(corpus.document_tokens[7]), int(corpus.document_sentences[7])
    cut = {"tokens": corpus.tokens[begin : begin + 40], "document_tokens": np.array([0, 40])}
    first = corpus.first_token[sentences : sentences + 4] - begin
    cut |= {"first_token": first, "document_sentences": np.array([0, len(first)])}
    cut |= {name: getattr(corpus, name)[sentences : sentences + 4] for name in ("embeddings", "actions")}
    run = settings(tiny_run, 48, 24)
    run.corpus = replace(corpus, **cut)
    zero, one = np.array([0]), np.array([1])
    examples = Examples(zero, one, np.array([40]), zero, zero, zero[:, None])
    found = read(ActivationReader(run, variant, PLACES, ["last", "mean"]), examples)
    if variant == "none":
        tokens = torch.from_numpy(run.corpus.tokens.astype(np.int64))[None]
        with torch.no_grad():
            hidden = run.plain_model()(tokens, output_hidden_states=True).hidden_states
        torch.testing.assert_close(found["hook_resid_post", 0][0, 0], hidden[1][0, -1], rtol=1e-4, atol=1e-4)
        mean = hidden[1][0, 1:].mean(0)
        torch.testing.assert_close(found["hook_resid_post", 0][1, 0], mean, rtol=1e-4, atol=1e-4)


def test_means_are_summed_in_float32(tiny_run: Run, monkeypatch: pytest.MonkeyPatch):
    """In an LM of half precision too: there, sums of hundreds of activations would lose their last digits."""
    run = tiny_run.with_settings({"lm.dtype": "bfloat16"})
    examples = ranges_of(run, np.array([4]))
    reader = ActivationReader(run, "none", [("hook_resid_post", 1)], ["mean"], windows=(48, 24))
    (found,) = reader.read(examples)
    assert found.dtype == reader.dtype == torch.bfloat16
    tokens = np.unique(
        np.concatenate([np.arange(a, b) for a, b in zip(examples.start, examples.stop, strict=True)])
    )
    document = np.full(len(tokens), 4)
    single = ActivationReader(run, "none", [("hook_resid_post", 1)], ["first"], windows=(48, 24))
    (alone,) = single.read(Examples.of_tokens(document, tokens, document, document[:, None]))
    for row, (start, stop) in enumerate(zip(examples.start, examples.stop, strict=True)):
        own = alone[0, 0, np.searchsorted(tokens, start) : np.searchsorted(tokens, stop)]
        assert torch.equal(found[0, 0, row], own.double().mean(0).bfloat16())


@pytest.mark.parametrize("column", [0, 20])
def test_a_token_that_overflows_spoils_the_means_of_its_own_ranges_alone(tiny_run: Run, column: int):
    examples = ranges_of(tiny_run, np.array([4]))
    reader = ActivationReader(tiny_run, "none", [("hook_resid_post", 1)], ["mean"])
    (expected,), forward = reader.read(examples), reader._forward

    def spoiling(tokens: Tensor, hooks: Sequence[Any], *given: Any) -> Any:
        def spoiled(read: Any) -> Any:
            return lambda x, hook=None: read(x.index_fill(1, torch.tensor([column]), torch.inf))

        return forward(tokens, [(name, spoiled(read)) for name, read in hooks], *given)

    spoiling.model = forward.model  # type: ignore[attr-defined]
    reader._forward = spoiling  # type: ignore[assignment]
    if column:
        with pytest.raises(ProbekitError, match="hook_resid_post, layer 1, are not all finite"):
            reader.read(examples)
    else:  # the first of a window is read in none, or in the window before
        torch.testing.assert_close(reader.read(examples)[0], expected)


# What does not matter


@pytest.mark.parametrize(("chunk", "batch"), [(1, 1), (7, 3), (11, 1000), (20, 2)])
@pytest.mark.parametrize("variant", ["none", "soft"])
def test_neither_chunks_nor_batches_matter(
    tiny_run: Run, chunk: int, batch: int, variant: str, monkeypatch: pytest.MonkeyPatch
):
    """Chunks of 7 cut every document, of 11 none: each has ten examples."""
    run = loud(settings(tiny_run))
    examples = at_anchors(run, np.array([12, 10, 13]))
    whole = read(reader_of(run, variant, [*PLACES, BEFORE], DISTANCES), examples)
    monkeypatch.setattr(activations, "CHUNK_EXAMPLES", chunk)
    run = loud(settings(tiny_run, **{"evaluation.batch_size": batch}))
    again = read(reader_of(run, variant, [*PLACES, BEFORE], DISTANCES), examples)
    for place, values in whole.items():
        torch.testing.assert_close(again[place], values, rtol=1e-4, atol=1e-4)


def test_what_else_is_read_does_not_matter(tiny_run: Run):
    run = loud(settings(tiny_run))
    examples = at_anchors(run, np.arange(10, 14))
    whole = read(reader_of(run, "soft", [*PLACES, BEFORE], DISTANCES), examples)
    few = np.arange(len(examples))[::-1][::9].copy()
    for place in (("attn.hook_z", 0), BEFORE, ("mlp.hook_post", 2)):
        alone = read(reader_of(run, "soft", [place], (17, 2)), examples[few])
        assert list(alone) == [place]
        torch.testing.assert_close(alone[place], whole[place][[3, 1]][:, few], rtol=1e-4, atol=1e-4)


def test_places_of_one_width_go_together():
    places = [("a", 0), ("b", 0), ("a:before", 1), ("b", 1)]
    blocks = stacks_of(places, {"a": 2, "b": 3})
    assert blocks == [Stack(2, (("a", 0), ("a:before", 1))), Stack(3, (("b", 0), ("b", 1)))]


def test_bfloat16_is_close_and_comes_back_as_float32(tiny_run: Run):
    examples = at_anchors(tiny_run, DOCUMENTS)
    exact, rough = (
        read(reader_of(settings(tiny_run, **{"training.precision": p}), "none", PLACES, DISTANCES), examples)
        for p in ("float32", "bfloat16")
    )
    for place, values in exact.items():
        scale = values.abs().max().item()
        torch.testing.assert_close(rough[place], values, rtol=0, atol=0.05 * scale)
    assert any((rough[place] != values).any() for place, values in exact.items())


# Conditioning


def test_conditioning_reaches_its_own_layers_alone(tiny_run: Run):
    run = loud(settings(tiny_run))
    examples, places = at_anchors(run, DOCUMENTS), [*PLACES, BEFORE]
    plain = read(reader_of(run, "none", places, DISTANCES), examples)
    conditioned = read(reader_of(run, "soft", places, DISTANCES), examples)
    changed = reader_of(run, "soft", places, DISTANCES).changed_by_conditioning()
    for place in places:
        difference = (conditioned[place] - plain[place]).abs()
        if place in changed:
            assert difference.amax(dim=2).min() > 1e-3, place
        else:  # layer 2 is the only one that is conditioned: it reads nothing that was changed
            torch.testing.assert_close(conditioned[place], plain[place], rtol=1e-4, atol=1e-5)


def test_a_sentences_action_is_read_from_the_token_before_it(tiny_run: Run):
    """Another codebook entry of one sentence changes nothing before the position that predicts its start."""
    run, corpus = loud(settings(tiny_run, 48, 24)), tiny_run.corpus
    sentence = int(corpus.document_sentences[12]) + 4
    anchor = np.arange(corpus.document_tokens[12] + 2, corpus.document_tokens[13])
    empty = np.zeros(len(anchor), np.int64)
    examples = Examples.of_tokens(np.full(len(anchor), 12), anchor, empty, empty[:, None])
    places: list[HookPoint] = [("hook_resid_post", 2), ("attn.hook_z", 2), BEFORE]
    before = read(reader_of(run, "soft", places, [1]), examples)
    # The planner reads sentences before the one it plans: another one changes the plan of the next.
    embeddings = np.array(corpus.embeddings)
    embeddings[sentence - 1] *= -3
    run.corpus = replace(corpus, embeddings=embeddings)
    after = read(reader_of(run, "soft", places, [1]), examples)
    position = anchor - 1
    for place in places:
        changed = (before[place][0] != after[place][0]).any(dim=1).numpy()
        assert not changed[position < corpus.first_token[sentence] - 1].any()
        reached = (position >= corpus.first_token[sentence] - 1) & (
            position < corpus.first_token[sentence + 1] - 1
        )
        assert changed[reached].all() == (place != BEFORE), place


CHANGED_IN_GPT2 = {
    ("attn.hook_z", 2),
    ("hook_attn_out", 2),
    ("hook_resid_mid", 2),
    ("hook_mlp_out", 2),
    ("mlp.hook_post", 2),
    ("hook_resid_post", 2),
    ("ln_final.hook_out", 2),
}


@pytest.mark.parametrize(
    ("variant", "changed"),
    [("none", set()), ("random", set()), ("oracle", CHANGED_IN_GPT2), ("joint", CHANGED_IN_GPT2)],
)
def test_places_that_an_action_changes(tiny_run: Run, variant: str, changed: set[HookPoint]):
    """Layers below the conditioned one, its input, and its heads as they were before."""
    found = reader_of(tiny_run, variant, [*PLACES, BEFORE], [1, 2]).changed_by_conditioning()
    assert found == changed


def conditioned_run(
    config: Config, folder: Path, model: GPTNeoXConfig | LlamaConfig, tokenizer: Any, location: str, skip: int
) -> Run:
    """A run whose LM is of another architecture, with an adapter that was hardly trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(model).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    few = {"corpus.planted.documents": 60, "training.planner.epochs": 1, "training.adapter.epochs": 0.1}
    lm = {"lm.name": str(folder / "model"), "mixing.variants": ["soft"]}
    where = {"conditioning.location": location, "conditioning.skip_layers": skip}
    return train(config.override({**few, **lm, **where}), folder / "run", quiet=True)


SIZE = {
    "vocab_size": 560, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "max_position_embeddings": 48, "initializer_range": 0.2,
}  # fmt: skip


def test_places_that_an_action_changes_in_parallel_blocks(tiny_config: Config, tiny_run: Run, tmp_path: Path):
    """GPT-NeoX's MLP reads what its attention reads: that of the first conditioned layer gets nothing."""
    run = conditioned_run(
        tiny_config, tmp_path, GPTNeoXConfig(**SIZE), tiny_run.corpus.tokenizer, "attn.hook_z", skip=1
    )
    of_block = ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
    every = [(location, layer) for location in [*of_block, "attn.hook_z:before"] for layer in range(3)]
    reader = reader_of(run, "soft", [*every, ("hook_embed", 0), ("ln_final.hook_out", 2)], [1])
    untouched = {place for place in every if place[1] == 0}
    untouched |= {("hook_resid_pre", 1), ("attn.hook_z:before", 1), ("hook_mlp_out", 1)}
    assert reader.changed_by_conditioning() == {*every, ("ln_final.hook_out", 2)} - untouched


def test_places_that_an_action_changes_through_attention_alone(
    tiny_config: Config, tiny_run: Run, tmp_path: Path
):
    """What a query looks for changes what the heads read only where the tokens are unlike."""
    run = conditioned_run(
        tiny_config, tmp_path, LlamaConfig(**SIZE), tiny_run.corpus.tokenizer, "attn.hook_q", skip=0
    )
    places = [("hook_resid_pre", 0), ("attn.hook_q:before", 0), ("attn.hook_q", 0)]
    places += [("attn.hook_k", 0), ("attn.hook_z", 0), ("hook_resid_post", 0), ("hook_resid_pre", 1)]
    changed = reader_of(run, "soft", places, [1]).changed_by_conditioning()
    assert changed == {("attn.hook_q", 0), ("attn.hook_z", 0), ("hook_resid_post", 0), ("hook_resid_pre", 1)}


# What is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch, value: float
):
    run = settings(tiny_run)
    places: list[HookPoint] = [("hook_resid_post", 0), ("hook_mlp_out", 1), ("hook_resid_post", 2)]
    reader, before = reader_of(run, "none", places, [1]), reader_of(run, "none", places[:1], [1])
    call = HFBackend.__call__

    def broken(self: HFBackend, tokens: Tensor, hooks: Sequence[Any], *more: Any) -> None:
        breaks = [("blocks.1.hook_mlp_out", lambda x: x * value)] if len(hooks) > 1 else []
        call(self, tokens, [*breaks, *hooks], *more)

    monkeypatch.setattr(HFBackend, "__call__", broken)
    examples = at_anchors(run, np.array([4]))
    with pytest.raises(ProbekitError, match=r"activations at hook_mlp_out, layer 1, are not all finite"):
        read(reader, examples)
    assert read(before, examples)


def test_values_whose_sum_overflows_are_finite():
    block = Stack(2, (("a", 0), ("b", 3)))
    values = torch.full((2, 1, 2, 2), 3e38)
    check_finite(block, values, torch.float32)
    values[1, 0, 1, 0] = float("nan")
    for dtype, advice in ((torch.float16, "give lm.dtype bfloat16"), (torch.float32, "in the checkpoint")):
        with pytest.raises(ProbekitError, match=f"at b, layer 3, are not all finite in .*{advice}"):
            check_finite(block, values, dtype)


# Chunks


@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 40), st.integers(0, 10))
def test_chunks_cover_all_and_cut_long_documents_alone(counts: list[int], most: int, seed: int):
    numbers = np.random.default_rng(seed).permutation(len(counts))
    document = np.repeat(numbers, counts)
    slices = list(chunk_slices(document, most, 2 * most))
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(len(document)))
    for part in slices:
        alone = document[part.start] == document[part.stop - 1]
        assert 0 < part.stop - part.start <= (2 * most if alone else most)
        if part.stop < len(document) and document[part.stop - 1] == document[part.stop]:
            assert counts[np.flatnonzero(numbers == document[part.stop])[0]] > 2 * most
    # No chunk could have taken in the next document whole: few chunks, few passes.
    for part, following in itertools.pairwise(slices):
        first = document[following.start]
        whole = (document[following.start :] == first).sum()
        starts_there = following.start == np.flatnonzero(document == first)[0]
        assert not (starts_there and part.stop - part.start + whole <= most)
