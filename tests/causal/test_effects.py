"""What edits do, against one scene at a time on the plain Hugging Face model with hooks made by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from probekit.causal.scenes import Edit, Outcomes, Scenes, Stage, draw_scenes
from probekit.data.windows import collate
from probekit.models.mixing import VARIANTS
from probekit.probing.results import Cell, LinearProbe, SavedProbes
from probekit.run.run import Run

LAST = ("hook_resid_post", 2)
PLACES = [("hook_resid_post", 0), ("hook_resid_post", 1), LAST]
FIELDS = ("next_loss", "first_loss", "other_loss", "first", "readout")


@pytest.fixture(scope="module")
def scenes(probed_run: Run) -> Scenes:
    corpus = probed_run.corpus
    return draw_scenes(corpus, corpus.documents("test"), 12, 40, 3, 0)


def readout_of(run: Run, variant: str) -> LinearProbe:
    return SavedProbes(run.folder / "probes", variant, 0)[Cell(*LAST, 1)]


@pytest.fixture(scope="module")
def stage(probed_run: Run, scenes: Scenes) -> Stage:
    return Stage(probed_run, "none", scenes, PLACES, (LAST, readout_of(probed_run, "none")))


def pushed(activations: Tensor, scenes: np.ndarray, distance: int) -> Tensor:
    """Another vector for every scene and distance."""
    generator = [torch.Generator().manual_seed(1000 * distance + int(n)) for n in scenes]
    width = activations.shape[1]
    return activations + torch.stack([torch.randn(width, generator=g) for g in generator])


def seen_by_hand(
    run: Run, scenes: Scenes, layer: int | None, distances: tuple[int, ...], probe: LinearProbe
) -> dict[str, Any]:
    """The outcomes of every scene, read without any of what is tested."""
    corpus, model = run.corpus, run.plain_model().eval()
    found: dict[str, list[Any]] = {name: [] for name in FIELDS}
    for n in range(len(scenes)):
        start, length = scenes.windows.start[n], scenes.windows.length[n]
        tokens = torch.from_numpy(corpus.tokens[start : start + length + 1].astype(np.int64))
        anchor = corpus.first_token[scenes.sentence[n]]
        states: list[Tensor] = []

        def edit(module: Any, inputs: Any, output: Any, n: int = n, first: int = anchor - start) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for distance in distances:
                at = first - distance
                hidden[0, at] = pushed(hidden[0, at][None], np.array([n]), distance)[0]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        def look(module: Any, inputs: Any, output: Any, states: list[Tensor] = states) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        blocks = model.transformer.h
        handles = [] if layer is None else [blocks[layer].register_forward_hook(edit)]
        handles.append(blocks[2].register_forward_hook(look))
        with torch.no_grad():
            log_p = model(tokens[None, :-1]).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        losses = -log_p.gather(1, tokens[1:, None])[:, 0].double()
        sentence = scenes.sentence[n]
        of_document = corpus.document_sentences[corpus.document_of(np.array([sentence]))[0] + 1]
        behind = corpus.first_token[sentence + 1] if sentence + 1 < of_document else start + length + 1
        # losses[i] is of the token start + i + 1
        own = slice(anchor - start - 1, behind - start - 1)
        found["next_loss"].append(losses[own].sum())
        found["first_loss"].append(losses[own.start])
        found["other_loss"].append(losses[own.stop :].sum())
        found["first"].append(log_p[anchor - start - 1].numpy())
        state = states[0][0, anchor - start - 1]
        found["readout"].append((state @ probe.coef + probe.intercept).log_softmax(-1).numpy())
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize(
    ("layer", "distances"), [(None, ()), (0, (1,)), (1, (3,)), (0, (1, 2, 3)), (2, (1,)), (2, (1, 2))]
)
def test_outcomes_are_those_of_hooks_made_by_hand(
    layer: int | None, distances: tuple[int, ...], probed_run: Run, scenes: Scenes, stage: Stage
):
    edit = None if layer is None else Edit(("hook_resid_post", layer), distances, pushed)
    found = stage.play(edit)
    expected = seen_by_hand(probed_run, scenes, layer, distances, readout_of(probed_run, "none"))
    for name in FIELDS:
        np.testing.assert_allclose(getattr(found, name), expected[name], atol=2e-4, err_msg=name)
    for n in range(len(scenes)):
        tokens = np.arange(
            scenes.windows.start[n] + 1, scenes.windows.start[n] + scenes.windows.length[n] + 1
        )
        sentence = np.searchsorted(probed_run.corpus.first_token, tokens, side="right") - 1
        assert found.next_tokens[n] == (sentence == scenes.sentence[n]).sum()
        assert found.other_tokens[n] == (sentence > scenes.sentence[n]).sum()


def test_scenes_without_tokens_behind_the_sentence_have_no_loss_there(probed_run: Run):
    corpus = probed_run.corpus
    short = draw_scenes(corpus, corpus.documents("test"), 16, 12, 3, 0)
    found = Stage(probed_run, "none", short, PLACES, (LAST, readout_of(probed_run, "none"))).play()
    ended = short.last == short.windows.length - 1
    assert ended.any()
    assert not ended.all()
    np.testing.assert_array_equal(found.other_tokens == 0, ended)
    np.testing.assert_array_equal(found.other_loss == 0, ended)


def test_no_road_leads_from_the_last_layer_but_where_the_token_is_predicted(stage: Stage):
    plain, edited = stage.play(), stage.play(Edit(LAST, (2, 3), pushed))
    for name in FIELDS:
        np.testing.assert_allclose(getattr(edited, name), getattr(plain, name), atol=1e-6, err_msg=name)
    assert (edited.moved > 1).all()


def test_moved_is_the_norm_of_what_was_added(stage: Stage, scenes: Scenes):
    found = stage.play(Edit(PLACES[0], (1, 3), pushed))
    before = stage.activations(PLACES[0], (1, 3))
    numbers = np.arange(len(scenes))
    added = [pushed(x, numbers, d) - x for x, d in zip(before, (1, 3), strict=True)]
    np.testing.assert_allclose(found.moved, sum(x.norm(dim=1) for x in added), rtol=1e-4)
    np.testing.assert_allclose(found.norm, sum(x.norm(dim=1) for x in before), rtol=1e-4)


def test_activations_are_those_at_the_distance(probed_run: Run, scenes: Scenes, stage: Stage):
    model = probed_run.plain_model().eval()
    found = stage.activations(("hook_resid_post", 1), (1, 3))
    for n in range(len(scenes)):
        start, length = scenes.windows.start[n], scenes.windows.length[n]
        tokens = torch.from_numpy(probed_run.corpus.tokens[start : start + length].astype(np.int64))
        with torch.no_grad():
            states = model(tokens[None], output_hidden_states=True).hidden_states[2][0]
        anchor = probed_run.corpus.first_token[scenes.sentence[n]]
        torch.testing.assert_close(
            found[:, n], states[[anchor - 1 - start, anchor - 3 - start]], atol=1e-4, rtol=1e-4
        )


def test_batches_change_nothing(probed_run: Run, scenes: Scenes, stage: Stage):
    small = probed_run.with_settings({"evaluation.batch_size": 5})
    other = Stage(small, "none", scenes, PLACES, (LAST, readout_of(probed_run, "none")))
    edit = Edit(PLACES[0], (1, 2), pushed)
    for first, second in zip(vars(stage.play(edit)).values(), vars(other.play(edit)).values(), strict=True):
        np.testing.assert_allclose(first, second, atol=2e-4)


# Conditioned


def conditioned_by_hand(
    run: Run, scenes: Scenes, change: Callable[..., Any] | None, place: str, mixing: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and the next token's log-probabilities of every scene, through the bridge."""
    model = run.model("soft")
    losses, first = [], []
    for n in range(len(scenes)):
        batch = collate(run.corpus, scenes.windows[np.array([n])])
        hooks = model.hooks(batch, mixing(batch, n) if mixing else VARIANTS["soft"].evaluation)
        at = int(run.corpus.first_token[scenes.sentence[n]] - scenes.windows.start[n] - 1)
        if change is not None:

            def edit(activation: Tensor, hook: Any, n: int = n, at: int = at) -> Tensor:
                activation = activation.clone()
                shape = activation[0, at].shape
                activation[0, at] = change(activation[0, at].reshape(1, -1), np.array([n]), 1).view(shape)
                return activation

            hooks = [*hooks, (place, edit)]
        with torch.no_grad(), model.bridged.hooks(fwd_hooks=hooks):
            log_p = model.bridged(batch.tokens, return_type="logits")[0].log_softmax(-1)
        own = -log_p.gather(1, batch.targets[0, :, None])[:, 0].double()
        losses.append(own[scenes.column[n] : scenes.last[n] + 1].sum().item())
        first.append(log_p[at].numpy())
    return np.array(losses), np.array(first)


@pytest.fixture(scope="module")
def soft_stage(probed_run: Run, scenes: Scenes) -> Stage:
    places = [("attn.hook_z", 2), ("hook_resid_post", 1)]
    return Stage(probed_run, "soft", scenes, places, (LAST, readout_of(probed_run, "soft")))


def assert_seen(found: Outcomes, expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(found.next_loss, expected[0], atol=5e-4)
    np.testing.assert_allclose(found.first, expected[1], atol=5e-4)


def test_edits_of_a_conditioned_variant_come_behind_the_adapter(
    probed_run: Run, scenes: Scenes, soft_stage: Stage
):
    assert_seen(soft_stage.play(), conditioned_by_hand(probed_run, scenes, None, ""))
    name = "blocks.2.attn.hook_z"
    assert name in probed_run.model("soft").adapter.names
    found = soft_stage.play(Edit(("attn.hook_z", 2), (1,), pushed))
    assert_seen(found, conditioned_by_hand(probed_run, scenes, pushed, name))
    # What is put in place behind the adapter is all that is there: the plan is gone.
    nothing = soft_stage.play(Edit(("attn.hook_z", 2), (1,), lambda x, n, d: torch.zeros_like(x)))
    zeros = conditioned_by_hand(probed_run, scenes, lambda x, n, d: torch.zeros_like(x), name)
    assert_seen(nothing, zeros)


def test_another_plan_is_that_of_the_next_sentence_alone(probed_run: Run, scenes: Scenes, soft_stage: Stage):
    target = (scenes.action + 3) % probed_run.corpus.k
    codebook = soft_stage.codebook
    assert codebook is not None

    def mixing(batch: Any, n: int) -> Any:
        def mix(scores: Tensor, actions: Tensor, book: Tensor, temperature: Any) -> Tensor:
            embeddings = VARIANTS["soft"].evaluation(scores, actions, book, temperature)
            (row,) = np.flatnonzero(touched(probed_run, scenes, n) == scenes.sentence[n])
            embeddings[row] = book[target[n]]
            return embeddings

        mix.needs_scores = True  # type: ignore[attr-defined]
        return mix

    plan = Edit(None, (1,), lambda x, n, d: codebook[torch.from_numpy(target[n])])
    found = soft_stage.play(plan)
    assert_seen(found, conditioned_by_hand(probed_run, scenes, None, "", mixing))
    assert np.abs(found.next_loss - soft_stage.play().next_loss).max() > 1e-4


def touched(run: Run, scenes: Scenes, n: int) -> np.ndarray:
    """The sentences that hold a scene's targets, in order."""
    start, length = scenes.windows.start[n], scenes.windows.length[n]
    tokens = np.arange(start, start + length) + 1
    return np.unique(np.searchsorted(run.corpus.first_token, tokens, side="right") - 1)


def test_who_is_told_no_actions_has_no_codebook(stage: Stage):
    assert stage.codebook is None
