"""Activations against a plain Hugging Face model, run on nothing but the tokens before each position."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from probekit.corpus.examples import cut_windows
from probekit.corpus.store import Corpus
from probekit.errors import ProbekitError
from probekit.models.mixing import Fixed, Mixing, Oracle, Soft
from probekit.models.planned_lm import PlannedLM
from probekit.probing.activations import Activations, Place, read_activations
from probekit.progress import Progress
from probekit.run import Run

LOCATIONS = {
    "hook_resid_pre": 32,
    "hook_resid_mid": 32,
    "hook_resid_post": 32,
    "hook_attn_out": 32,
    "hook_mlp_out": 32,
    "attn.hook_z": 32,
    "mlp.hook_post": 128,
}
"""Locations and the width of each in the tiny LM."""
PLACES = [(location, layer) for location in LOCATIONS for layer in range(3)]


def read(
    model: PlannedLM,
    corpus: Corpus,
    documents: np.ndarray,
    positions: np.ndarray,
    places: list[Place] = PLACES,
    *,
    mixing: Mixing | None = None,
    window: int = 20,
    stride: int = 7,
    batch_size: int = 8,
    precision: str = "float32",
) -> Activations:
    with Progress(quiet=True).task("read") as task:
        return read_activations(
            model,
            mixing or Fixed(),
            corpus,
            cut_windows(corpus, documents, window, stride),
            positions,
            places,
            batch_size=batch_size,
            precision=precision,
            task=task,
        )


def loud(model: PlannedLM) -> PlannedLM:
    """The model with an adapter that cannot be overheard."""
    model.adapter.projections.data *= 300
    return model


def some_positions(corpus: Corpus, documents: np.ndarray, count: int = 60) -> np.ndarray:
    """Positions of documents, the first and the last one with a token after it among them; no separators."""
    inside = np.concatenate(
        [np.arange(corpus.document_tokens[n] + 1, corpus.document_tokens[n + 1] - 1) for n in documents]
    )
    drawn = np.random.default_rng(0).choice(inside, size=count, replace=False)
    edges = [corpus.document_tokens[documents] + 1, corpus.document_tokens[documents + 1] - 2]
    return np.unique(np.concatenate([drawn, *edges]))


@torch.no_grad()
def slow_activations(run: Run, position: int, window: int, stride: int) -> dict[Place, torch.Tensor]:
    """All places at a position, from the window in which its next token is scored, cut off behind it."""
    corpus = run.corpus
    document = int(np.searchsorted(corpus.document_tokens, position, side="right")) - 1
    start, end = corpus.document_tokens[document : document + 2].tolist()
    stop = window
    while stop < position + 1 - start:
        stop += stride
    begin = start + max(0, min(stop, end - start - 1) - window)

    seen: dict[Place, torch.Tensor] = {}
    plain = run.plain_model().eval()
    for layer, block in enumerate(plain.transformer.h):

        def keep(location: str, layer: int = layer):
            def before(module, inputs) -> None:
                seen[location, layer] = inputs[0][0, -1]

            def after(module, inputs, output) -> None:
                seen[location, layer] = (output[0] if isinstance(output, tuple) else output)[0, -1]

            return before, after

        block.register_forward_pre_hook(keep("hook_resid_pre")[0])
        block.ln_2.register_forward_pre_hook(keep("hook_resid_mid")[0])
        block.register_forward_hook(keep("hook_resid_post")[1])
        block.attn.register_forward_hook(keep("hook_attn_out")[1])
        block.mlp.register_forward_hook(keep("hook_mlp_out")[1])
        block.attn.c_proj.register_forward_pre_hook(keep("attn.hook_z")[0])
        block.mlp.c_proj.register_forward_pre_hook(keep("mlp.hook_post")[0])
    plain(torch.tensor(corpus.tokens[begin : position + 1].astype(np.int64))[None])
    return seen


@pytest.mark.parametrize(("window", "stride"), [(48, 48), (20, 7), (5, 1)])
def test_every_place_equals_a_pass_over_the_tokens_before(tiny_run: Run, window: int, stride: int):
    corpus, documents = tiny_run.corpus, np.array([4, 30, 31])
    positions = some_positions(corpus, documents)
    found = read(tiny_run.model("none"), corpus, documents, positions, window=window, stride=stride)
    assert found.positions.tolist() == positions.tolist()
    assert sorted(found.values) == sorted(PLACES)
    for (location, _), values in found.values.items():
        assert values.shape == (len(positions), LOCATIONS[location]), location
        assert values.dtype == torch.float32
    for row, position in enumerate(positions.tolist()):
        for place, expected in slow_activations(tiny_run, position, window, stride).items():
            torch.testing.assert_close(found.values[place][row], expected, rtol=1e-4, atol=1e-5)


def test_first_windows_equal_hidden_states(tiny_run: Run):
    corpus, documents = tiny_run.corpus, np.array([0, 1, 2])
    starts = corpus.document_tokens[documents]
    positions = np.concatenate([np.arange(start + 1, start + 48) for start in starts])
    places = [("hook_resid_post", layer) for layer in range(2)]
    found = read(tiny_run.model("none"), corpus, documents, positions, places, window=48, stride=48)
    tokens = torch.tensor(np.stack([corpus.tokens[start : start + 48] for start in starts]).astype(np.int64))
    with torch.no_grad():
        states = tiny_run.plain_model().eval()(tokens, output_hidden_states=True).hidden_states
    for layer in range(2):
        expected = states[layer + 1][:, 1:].flatten(0, 1)
        torch.testing.assert_close(found.values["hook_resid_post", layer], expected, rtol=1e-4, atol=1e-5)


def test_reading_does_not_depend_on_batches_or_on_what_else_is_read(tiny_run: Run):
    corpus, documents = tiny_run.corpus, np.arange(10, 14)
    model, positions = loud(tiny_run.model("soft")), some_positions(tiny_run.corpus, np.arange(10, 14))
    whole = read(model, corpus, documents, positions, mixing=Soft())
    for batch_size in (1, 3, 1000):
        again = read(model, corpus, documents, positions, mixing=Soft(), batch_size=batch_size)
        for place in PLACES:
            torch.testing.assert_close(again.values[place], whole.values[place], rtol=1e-4, atol=1e-4)
    few = positions[::9]
    for place in (("attn.hook_z", 0), ("mlp.hook_post", 2)):
        alone = read(model, corpus, documents, few, [place], mixing=Soft())
        assert list(alone.values) == [place]
        torch.testing.assert_close(alone.values[place], whole.values[place][::9], rtol=1e-4, atol=1e-4)


def test_documents_without_positions_are_skipped(tiny_run: Run):
    corpus, documents = tiny_run.corpus, np.arange(20, 30)
    positions = some_positions(corpus, np.array([25]), count=20)
    model = tiny_run.model("none")
    found = read(model, corpus, documents, positions, batch_size=2)
    expected = read(model, corpus, np.array([25]), positions, batch_size=2)
    for place in PLACES:
        torch.testing.assert_close(found.values[place], expected.values[place], rtol=1e-4, atol=1e-5)


def test_conditioning_reaches_its_own_layers_alone(tiny_run: Run):
    corpus, documents = tiny_run.corpus, np.array([5, 6])
    positions = some_positions(corpus, documents)
    model = loud(tiny_run.model("oracle"))
    plain = read(tiny_run.model("none"), corpus, documents, positions)
    conditioned = read(model, corpus, documents, positions, mixing=Oracle())
    for location, layer in PLACES:
        difference = (conditioned.values[location, layer] - plain.values[location, layer]).abs()
        if layer < 2 or location == "hook_resid_pre":
            assert not difference.any(), (location, layer)
        else:
            assert difference.amax(dim=1).min() > 1e-3, (location, layer)
    # Where it is added, the difference is the projected embedding of the next token's sentence.
    holders = np.searchsorted(corpus.first_token, positions + 1, side="right") - 1
    added = model.adapter.codebook[corpus.actions[holders].astype(int)] @ model.adapter.projections[0]
    place = ("attn.hook_z", 2)
    torch.testing.assert_close(conditioned.values[place] - plain.values[place], added, rtol=1e-3, atol=1e-4)


def test_a_sentences_action_is_read_from_the_token_before_it(tiny_run: Run):
    """Another action of one sentence changes nothing before the position that predicts its first token."""
    corpus, document = tiny_run.corpus, np.array([12])
    sentence = int(corpus.document_sentences[12]) + 4
    actions = np.array(corpus.actions)
    actions[sentence] = (actions[sentence] + 1) % 8
    positions = np.arange(corpus.document_tokens[12] + 1, corpus.document_tokens[13] - 1)
    model = loud(tiny_run.model("oracle"))
    options = {"mixing": Oracle(), "window": 48, "stride": 24}
    before = read(model, corpus, document, positions, [("hook_resid_post", 2)], **options)
    after = read(
        model, replace(corpus, actions=actions), document, positions, [("hook_resid_post", 2)], **options
    )
    changed = (before.values["hook_resid_post", 2] != after.values["hook_resid_post", 2]).any(dim=1).numpy()
    first, following = corpus.first_token[sentence : sentence + 2]
    assert not changed[positions < first - 1].any()
    assert changed[(positions >= first - 1) & (positions < following - 1)].all()


def test_bfloat16_is_close_and_comes_back_as_float32(tiny_run: Run):
    corpus, documents = tiny_run.corpus, np.array([4])
    positions = some_positions(corpus, documents, count=20)
    exact = read(tiny_run.model("none"), corpus, documents, positions)
    rough = read(tiny_run.model("none"), corpus, documents, positions, precision="bfloat16")
    for place in PLACES:
        assert rough.values[place].dtype == torch.float32
        scale = exact.values[place].abs().max().item()
        torch.testing.assert_close(rough.values[place], exact.values[place], rtol=0, atol=0.05 * scale)
    assert any((rough.values[place] != exact.values[place]).any() for place in PLACES)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(tiny_run: Run, monkeypatch, value: float):
    model = tiny_run.model("none")
    hook = ("blocks.1.hook_mlp_out", lambda activation, hook: activation * value)
    monkeypatch.setattr(model, "hooks", lambda batch, mixing: [hook])
    positions = some_positions(tiny_run.corpus, np.array([4]), count=5)
    places = [("hook_resid_post", 0), ("hook_mlp_out", 1)]
    with pytest.raises(ProbekitError, match=r"activations at hook_mlp_out, layer 1, are not all finite"):
        read(model, tiny_run.corpus, np.array([4]), positions, places)
    assert read(model, tiny_run.corpus, np.array([4]), positions, places[:1]).values


def test_activations_at_some_of_the_positions():
    positions = np.array([3, 5, 8, 13])
    values = {("a", 0): torch.arange(8.0).view(4, 2), ("b", 0): torch.ones(4, 3), ("a", 1): -torch.ones(4, 2)}
    activations = Activations(positions, values)
    assert activations.by_width() == [[("a", 0), ("a", 1)], [("b", 0)]]
    found = activations.at([("a", 1), ("a", 0)], np.array([13, 5, 5]))
    assert found.tolist() == [[[-1, -1]] * 3, [[6, 7], [2, 3], [2, 3]]]
