"""LMs without some components, against hooks made by hand on the plain Hugging Face model and the bridge."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from probekit.causal.components import MaskedLM
from probekit.data.windows import Windows, collate, cut_windows
from probekit.errors import ProbekitError
from probekit.models.conditioning import CONDITIONINGS, new_adapter
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import ActivationReader
from probekit.probing.grid import make_grid
from probekit.probing.targets import find_target
from probekit.progress import Progress
from probekit.run.run import Run

SIZE, WIDTH = 16, 32
"""Of a head, and of both together."""


def windows_of(run: Run, split: str, count: int = 6, stride: int = 24) -> Windows:
    return cut_windows(run.corpus, run.corpus.documents(split)[:count], 48, stride)


def masked_lm(run: Run, variant: str, batch_size: int = 4) -> MaskedLM:
    masked = MaskedLM(run, variant)
    masked.measure_means(windows_of(run, "probe"), batch_size, Progress(quiet=True))
    return masked


@pytest.fixture(scope="module")
def plain(probed_run: Run) -> MaskedLM:
    return masked_lm(probed_run, "none")


@pytest.fixture(scope="module")
def soft(probed_run: Run) -> MaskedLM:
    return masked_lm(probed_run, "soft")


@pytest.mark.parametrize("variant", ["none", "soft"])
def test_with_nothing_removed_it_is_the_lm_to_the_bit(
    variant: str, probed_run: Run, plain: MaskedLM, soft: MaskedLM
):
    masked = plain if variant == "none" else soft
    windows = windows_of(probed_run, "test")
    scored = masked.scored(windows)
    with torch.no_grad():
        logits, states = masked(scored, masked.nothing)
        model = probed_run.model(variant)
        expected = model(collate(probed_run.corpus, windows), VARIANTS["soft"].evaluation)
    assert torch.equal(logits, expected)
    assert torch.equal(states, masked.states(scored, masked.nothing))


@pytest.mark.parametrize("stride", [24, 48])
def test_positions_are_those_of_sentences(stride: int, probed_run: Run, plain: MaskedLM):
    corpus = probed_run.corpus
    windows = windows_of(probed_run, "test", stride=stride)
    scored = plain.scored(windows)
    found = {}
    for name in ("first", "rest", "other"):
        window, column = getattr(scored, name).nonzero(as_tuple=True)
        found[name] = sorted((windows.start[window] + column.numpy() + 1).tolist())
    expected: dict[str, list[int]] = {"first": [], "rest": [], "other": []}
    for document in corpus.documents("test")[:6]:
        sentences = range(*corpus.document_sentences[document : document + 2])
        edges = [*corpus.first_token[sentences].tolist(), int(corpus.document_tokens[document + 1])]
        for number, (start, stop) in enumerate(itertools.pairwise(edges)):
            expected["other" if number == 0 else "first"] += [start] if number else range(start, stop)
            expected["rest"] += range(start + 1, stop) if number else []
    assert found == {name: sorted(tokens) for name, tokens in expected.items()}
    at = windows.start[scored.row] + scored.first.nonzero()[:, 1].numpy() + 1
    sentence = np.searchsorted(corpus.first_token, at, side="right") - 1
    np.testing.assert_array_equal(scored.labels, corpus.actions[sentence])


def test_states_are_what_probes_are_fitted_on(probed_run: Run, plain: MaskedLM):
    settings = probed_run.config.probe.model_copy(update={"positions": (1,)})
    grid = make_grid(probed_run.corpus, settings, find_target(probed_run.corpus, "action"), 0)
    examples = grid.examples["test"]
    (expected,) = ActivationReader(probed_run, "none", [("hook_resid_post", 2)], (1,)).read(examples)
    every = len(probed_run.corpus.documents("test"))
    scored = plain.scored(windows_of(probed_run, "test", every))
    torch.testing.assert_close(plain.states(scored, plain.nothing), expected[0, 0], atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(scored.labels, examples.labels[:, 0])


def heads_by_hand(run: Run, windows: Windows, change: Any) -> list[torch.Tensor]:
    """Logits of each window, one at a time; `change(layer, z)` takes all heads `[positions, width]`."""
    model = run.plain_model().eval()
    found = []
    for start, length in zip(windows.start, windows.length, strict=True):
        tokens = torch.from_numpy(run.corpus.tokens[start : start + length].astype(np.int64))
        handles = [
            block.attn.c_proj.register_forward_pre_hook(
                lambda _, inputs, layer=layer: (change(layer, inputs[0][0])[None],)
            )
            for layer, block in enumerate(model.transformer.h)
        ]
        with torch.no_grad():
            found.append(model(tokens[None]).logits[0])
        for handle in handles:
            handle.remove()
    return found


def means_by_hand(run: Run) -> torch.Tensor:
    """The mean of all heads over the scored tokens `[layers, width]`."""
    windows = windows_of(run, "probe")
    kept: list[list[torch.Tensor]] = [[], [], []]
    scored = iter([int(n) for n in windows.scored for _ in range(3)])

    def keep(layer: int, z: torch.Tensor) -> torch.Tensor:
        kept[layer].append(z[-next(scored) :].double())
        return z

    heads_by_hand(run, windows, keep)
    return torch.stack([torch.cat(parts).mean(0) for parts in kept]).float()


def test_removed_heads_are_their_means(probed_run: Run, plain: MaskedLM):
    means = means_by_hand(probed_run)
    removed = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.25, 0.0]])

    def change(layer: int, z: torch.Tensor) -> torch.Tensor:
        share = removed[0, 2 * layer : 2 * layer + 2].repeat_interleave(SIZE)
        return share * means[layer] + (1 - share) * z

    windows = windows_of(probed_run, "test", 3)
    expected = heads_by_hand(probed_run, windows, change)
    with torch.no_grad():
        logits, _ = plain(plain.scored(windows), removed)
    for row, own in enumerate(expected):
        torch.testing.assert_close(logits[row, : len(own)], own, atol=2e-4, rtol=1e-4)


def test_every_window_may_have_a_mask_of_its_own(probed_run: Run, plain: MaskedLM):
    windows = windows_of(probed_run, "test", 1)
    masks = torch.eye(6)[: len(windows)]
    scored = plain.scored(windows)
    with torch.no_grad():
        together, _ = plain(scored, masks)
        for row in range(len(windows)):
            torch.testing.assert_close(together[row], plain(scored, masks[row : row + 1])[0][row])


def test_without_the_adapters_parts_all_tokens_carry_the_mean_plan(probed_run: Run, soft: MaskedLM):
    """By hand on the bridge: what the adapter adds is replaced by its mean over tokens; heads stay."""
    mixing, model = VARIANTS["soft"].evaluation, probed_run.model("soft")

    def carried(batch: Any) -> torch.Tensor:
        with torch.no_grad():
            plans = mixing(model.scores(batch), batch.actions, model.adapter.codebook, model.temperature)
            return (plans @ model.adapter.projections[0])[batch.sentence]

    fitted_on = collate(probed_run.corpus, windows_of(probed_run, "probe"))
    mean = carried(fitted_on)[fitted_on.targets != -100].double().mean(0).float()
    windows = windows_of(probed_run, "test", 3)
    batch = collate(probed_run.corpus, windows)

    def add(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        own = carried(batch)
        own[..., SIZE:] = mean[SIZE:]
        return activation + own.view_as(activation)

    bridged = probed_run.frozen_lm("soft").bridged
    with torch.no_grad(), bridged.hooks(fwd_hooks=[("blocks.2.attn.hook_z", add)]):
        expected = bridged(batch.tokens, return_type="logits")
    removed = torch.zeros(1, 8)
    removed[0, 7] = 1
    with torch.no_grad():
        logits, _ = soft(soft.scored(windows), removed)
    torch.testing.assert_close(logits, expected, atol=5e-4, rtol=1e-3)


def test_batches_change_no_mean(probed_run: Run, plain: MaskedLM):
    other = masked_lm(probed_run, "none", batch_size=7)
    for name, (mean, _) in plain.means.items():
        torch.testing.assert_close(other.means[name][0], mean)


@pytest.mark.parametrize("location", ["hook_resid_post", "attn.hook_z"])
@pytest.mark.parametrize("kind", sorted(CONDITIONINGS))
def test_every_kind_of_conditioning_has_its_parts(
    kind: str, location: str, probed_run: Run, monkeypatch: pytest.MonkeyPatch
):
    run = probed_run.with_settings({"conditioning.kind": kind, "conditioning.location": location})
    model = probed_run.model("soft")
    centroids = torch.from_numpy(run.corpus.codebook.centroids)
    model.adapter = new_adapter(run.config.conditioning, centroids, run.frozen_lm(), 0).requires_grad_(False)
    monkeypatch.setattr(Run, "model", lambda self, name: model)
    if kind == "token":
        with pytest.raises(ProbekitError, match=r"conditioning\.kind is 'token'.*subnetwork\.variant none"):
            MaskedLM(run, "soft")
        return
    masked = masked_lm(run, "soft")
    # All heads, and the adapter's parts in the last layer, where it is.
    parts = {
        ("embedding", location): ["adapter"],
        ("adapter", "hook_resid_post"): ["adapter 2"],
        ("adapter", "attn.hook_z"): ["adapter 2.0", "adapter 2.1"],
    }[kind, location]
    names = [str(component) for component in masked.components.all]
    assert sorted(names) == sorted(
        [f"head {layer}.{head}" for layer in range(3) for head in range(2)] + parts
    )
    # Without all parts, plans no longer matter: other ones give the same logits.
    removed = torch.tensor([[float(c.kind == "adapter") for c in masked.components.all]])
    windows = windows_of(run, "test", 2)
    with torch.no_grad():
        logits, states = masked(masked.scored(windows), removed)
        whole, _ = masked(masked.scored(windows), masked.nothing)
        model.adapter.codebook.copy_(model.adapter.codebook.flip(0))
        other, other_states = masked(masked.scored(windows), removed)
    assert not torch.allclose(whole, logits, atol=1e-5)
    torch.testing.assert_close(other, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other_states, states, atol=1e-4, rtol=1e-4)
