"""Boundaries of made-up corpora, and edits against hooks made by hand on the plain Hugging Face model."""

from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probekit.causal.boundaries import (
    AppliedEdit,
    Boundaries,
    Change,
    Edit,
    EditedLM,
    Outcomes,
    draw_boundaries,
)
from probekit.config import BosRule
from probekit.data.windows import collate
from probekit.errors import ProbekitError
from probekit.models.mixing import VARIANTS
from probekit.probing.results import Cell, SavedProbes
from probekit.probing.targets import NO_LABEL
from probekit.run.run import Run

DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=8), min_size=1, max_size=12).filter(
    lambda documents: any(documents)
)
LAST = ("hook_resid_post", 2)
POINTS = [("hook_resid_post", 0), ("hook_resid_post", 1), LAST]
FIELDS = ("next_loss", "first_loss", "other_loss", "first", "label")


def corpus_of(documents: list[list[int]], bos: BosRule = "document") -> Any:
    """A corpus whose documents have sentences of these lengths, after a separator."""
    begins = np.concatenate([[0], np.cumsum([1 + sum(lengths) for lengths in documents])])
    first = [
        begin + 1 + sum(lengths[:n])
        for begin, lengths in zip(begins[:-1], documents, strict=True)
        for n in range(len(lengths))
    ]
    return SimpleNamespace(
        document_tokens=begins,
        document_sentences=np.concatenate([[0], np.cumsum([len(lengths) for lengths in documents])]),
        first_token=np.array(first, dtype=np.int64),
        actions=np.arange(len(first), dtype=np.int16),
        group=np.arange(len(documents)),
        bos_rule=bos,
    )


@settings(max_examples=150)
@given(
    DOCUMENTS,
    st.sampled_from(get_args(BosRule)),
    st.integers(2, 12),
    st.integers(1, 12),
    st.integers(1, 15),
    st.integers(0, 5),
)
def test_columns_are_right(
    documents: list[list[int]], bos: BosRule, window: int, reach: int, count: int, seed: int
):
    corpus = corpus_of(documents, bos)
    numbers = np.arange(len(documents))
    possible = [
        any(1 + sum(lengths[:n]) - reach > 0 for n in range(1, len(lengths))) for lengths in documents
    ]
    if reach + (bos == "every-window") > window or not any(possible):
        with pytest.raises(ProbekitError, match=r"intervene\.distances"):
            draw_boundaries(corpus, corpus.actions, numbers, count, window, reach, seed)
        return
    drawn = draw_boundaries(corpus, corpus.actions, numbers, count, window, reach, seed)
    assert len(drawn) == min(count, sum(possible))
    assert len(set(drawn.windows.document)) == len(drawn)
    for n in range(len(drawn)):
        document, sentence = drawn.windows.document[n], drawn.sentence[n]
        begin, end = corpus.document_tokens[document : document + 2]
        start, length = drawn.windows.start[n], drawn.windows.length[n]
        column, last = drawn.column[n], drawn.last[n]
        of_document = range(*corpus.document_sentences[document : document + 2])
        assert sentence in of_document[1:]
        assert drawn.label[n] == corpus.actions[sentence]
        # Inputs and their targets are tokens of the document, in one window.
        assert begin + (bos == "none") <= start
        assert start + length <= end - 1
        assert length <= window
        assert drawn.windows.scored[n] == length
        # The token after the column is the sentence's first.
        anchor = start + column + 1
        assert anchor == corpus.first_token[sentence]
        assert column < length
        # Every distance reads a token in the window that is not the separator.
        assert column - (reach - 1) >= (bos == "every-window")
        assert start + column - (reach - 1) > begin
        # The last predicted token is the sentence's last one, or the window's.
        behind = corpus.first_token[sentence + 1] if sentence + 1 in of_document else end
        assert anchor <= start + last + 1 < behind
        assert last == length - 1 or start + last + 2 == behind


def test_the_only_boundary_is_drawn():
    corpus = corpus_of([[3, 4], [5], []])
    drawn = draw_boundaries(corpus, corpus.actions, np.arange(3), 9, 8, 2, 0)
    assert (drawn.windows.document.tolist(), drawn.sentence.tolist()) == ([0], [1])
    assert (drawn.windows.start[0], drawn.column[0]) == (0, 3)
    assert drawn.last[0] == drawn.windows.length[0] - 1 == 6


def test_sentences_without_a_label_are_no_boundaries():
    corpus = corpus_of([[3, 4, 2], [5, 3], [2, 2]])
    labels = np.array([0, NO_LABEL, 4, 1, NO_LABEL, 2, 3])
    drawn = draw_boundaries(corpus, labels, np.arange(3), 9, 8, 2, 0)
    assert sorted(zip(drawn.sentence.tolist(), drawn.label.tolist(), strict=True)) == [(2, 4), (6, 3)]


def test_a_group_has_one_boundary():
    """So no donor of an activation is a copy; a copy without a usable boundary takes no place."""
    corpus = corpus_of([[3, 4, 2], [3, 4, 2], [5], [5, 3, 3], [2, 2]])
    corpus.group = np.array([0, 0, 2, 2, 4])
    for seed in range(20):
        drawn = draw_boundaries(corpus, corpus.actions, np.arange(5), 9, 8, 2, seed)
        assert len(drawn) == 3
        assert sorted(corpus.group[drawn.windows.document].tolist()) == [0, 2, 4]


def test_the_first_boundaries_are_a_choice_at_random():
    """Sentences are written anew at the first few: in a sorted corpus they must not be of one kind."""
    corpus = corpus_of([[3, 4]] * 40)
    first = [
        draw_boundaries(corpus, corpus.actions, np.arange(40), 40, 8, 2, seed).windows.document[:10]
        for seed in range(30)
    ]
    assert abs(np.mean(first) - 19.5) < 3 * 11.5 / np.sqrt(300)


@pytest.fixture(scope="module")
def boundaries(probed_run: Run) -> Boundaries:
    corpus = probed_run.corpus
    return draw_boundaries(corpus, corpus.actions, corpus.documents("test"), 12, 40, 3, 0)


@pytest.fixture(scope="module")
def lm(probed_run: Run, boundaries: Boundaries) -> EditedLM:
    return EditedLM(probed_run, "none", boundaries, POINTS)


def pushed(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
    """Adds another vector for every boundary and distance."""
    generators = [torch.Generator().manual_seed(1000 * distance + int(n)) for n in numbers]
    return activations + torch.stack([torch.randn(activations.shape[1], generator=g) for g in generators])


def outcomes_by_hand(
    run: Run, boundaries: Boundaries, layer: int | None, distances: tuple[int, ...]
) -> dict[str, Any]:
    """The outcomes of every boundary, one at a time on the plain module."""
    corpus, model = run.corpus, run.plain_model().eval()
    probe = SavedProbes(run.folder / "probes", "none", 0)[Cell(*LAST, 1)]
    found: dict[str, list[Any]] = {name: [] for name in FIELDS}
    for n in range(len(boundaries)):
        start, length = boundaries.windows.start[n], boundaries.windows.length[n]
        tokens = torch.from_numpy(corpus.tokens[start : start + length + 1].astype(np.int64))
        sentence = boundaries.sentence[n]
        anchor = corpus.first_token[sentence]
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
        of_document = corpus.document_sentences[corpus.document_of(np.array([sentence]))[0] + 1]
        behind = corpus.first_token[sentence + 1] if sentence + 1 < of_document else start + length + 1
        own = slice(anchor - start - 1, behind - start - 1)  # losses[i] is of the token start + i + 1
        found["next_loss"].append(losses[own].sum())
        found["first_loss"].append(losses[own.start])
        found["other_loss"].append(losses[own.stop :].sum())
        found["first"].append(log_p[own.start].numpy())
        state = states[0][0, own.start]
        found["label"].append((state @ probe.coef + probe.intercept).log_softmax(-1).numpy())
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize(
    ("layer", "distances"), [(None, ()), (0, (1,)), (1, (3,)), (0, (1, 2, 3)), (2, (1,)), (2, (1, 2))]
)
def test_outcomes_are_those_of_hooks_made_by_hand(
    layer: int | None, distances: tuple[int, ...], probed_run: Run, boundaries: Boundaries, lm: EditedLM
):
    edit = None if layer is None else Edit(("hook_resid_post", layer), distances, pushed)
    found = lm.outcomes(edit)
    expected = outcomes_by_hand(probed_run, boundaries, layer, distances)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(found, name), expected[name], atol=2e-4, err_msg=name)
    for n, (start, length) in enumerate(
        zip(boundaries.windows.start, boundaries.windows.length, strict=True)
    ):
        tokens = np.arange(start + 1, start + length + 1)
        sentence = np.searchsorted(probed_run.corpus.first_token, tokens, side="right") - 1
        assert found.next_tokens[n] == (sentence == boundaries.sentence[n]).sum()
        assert found.other_tokens[n] == (sentence > boundaries.sentence[n]).sum()


def test_windows_that_end_with_the_sentence_have_no_loss_behind_it(probed_run: Run):
    corpus = probed_run.corpus
    short = draw_boundaries(corpus, corpus.actions, corpus.documents("test"), 16, 12, 3, 0)
    found = EditedLM(probed_run, "none", short, POINTS).outcomes()
    ended = short.last == short.windows.length - 1
    assert ended.any()
    assert not ended.all()
    np.testing.assert_array_equal(found.other_tokens == 0, ended)
    np.testing.assert_array_equal(found.other_loss == 0, ended)


def test_the_last_layer_affects_a_sentence_only_where_its_first_token_is_predicted(lm: EditedLM):
    plain, edited = lm.outcomes(), lm.outcomes(Edit(LAST, (2, 3), pushed))
    for name in FIELDS:
        np.testing.assert_allclose(getattr(edited, name), getattr(plain, name), atol=1e-6, err_msg=name)
    assert (edited.moved > 1).all()


def test_changes_are_computed_exactly_whatever_the_lms_arithmetic():
    weights = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    before = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    edit = Edit(("hook_resid_post", 0), (1,), lambda x, numbers, distance: x @ weights)
    applied = AppliedEdit(edit, np.arange(5), torch.arange(5))
    with torch.autocast("cpu", torch.bfloat16):
        found = applied._changed(before, 1)
    torch.testing.assert_close(found, before @ weights)


def test_moved_is_the_norm_of_the_edit(lm: EditedLM, boundaries: Boundaries):
    found = lm.outcomes(Edit(POINTS[0], (1, 3), pushed))
    before = lm.activations(POINTS[0], (1, 3))
    numbers = np.arange(len(boundaries))
    added = [pushed(x, numbers, d) - x for x, d in zip(before, (1, 3), strict=True)]
    np.testing.assert_allclose(found.moved, sum(x.norm(dim=1) for x in added), rtol=1e-4)
    np.testing.assert_allclose(found.norm, sum(x.norm(dim=1) for x in before), rtol=1e-4)


def test_activations_are_those_at_the_distance(probed_run: Run, boundaries: Boundaries, lm: EditedLM):
    model = probed_run.plain_model().eval()
    found = lm.activations(("hook_resid_post", 1), (1, 3))
    for n in range(len(boundaries)):
        start, length = boundaries.windows.start[n], boundaries.windows.length[n]
        tokens = torch.from_numpy(probed_run.corpus.tokens[start : start + length].astype(np.int64))
        with torch.no_grad():
            states = model(tokens[None], output_hidden_states=True).hidden_states[2][0]
        at = probed_run.corpus.first_token[boundaries.sentence[n]] - start
        torch.testing.assert_close(found[:, n], states[[at - 1, at - 3]], atol=1e-4, rtol=1e-4)


def test_batches_change_nothing(probed_run: Run, boundaries: Boundaries, lm: EditedLM):
    other = EditedLM(probed_run.with_settings({"evaluation.batch_size": 5}), "none", boundaries, POINTS)
    edit = Edit(POINTS[0], (1, 2), pushed)
    found = (vars(one.outcomes(edit)).values() for one in (lm, other))
    for first, second in zip(*found, strict=True):
        np.testing.assert_allclose(first, second, atol=2e-4)


# Conditioned variants

HEADS = ("attn.hook_z", 2)


def conditioned_by_hand(
    run: Run, boundaries: Boundaries, change: Change | None, mixing: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and the next token's log-probabilities of every boundary, through the bridge."""
    model = run.model("soft")
    losses, first = [], []
    for n in range(len(boundaries)):
        batch = collate(run.corpus, boundaries.windows[np.array([n])])
        hooks = model.conditioned(batch, mixing(n) if mixing else VARIANTS["soft"].evaluation).hooks
        at = int(run.corpus.first_token[boundaries.sentence[n]] - boundaries.windows.start[n] - 1)
        if change is not None:

            def edit(activation: Tensor, hook: Any, n: int = n, at: int = at) -> Tensor:
                activation = activation.clone()
                shape = activation[0, at].shape
                activation[0, at] = change(activation[0, at].reshape(1, -1), np.array([n]), 1).view(shape)
                return activation

            hooks = [*hooks, ("blocks.2.attn.hook_z", edit)]
        bridged = run.frozen_lm("soft").bridged
        with torch.no_grad(), bridged.hooks(fwd_hooks=hooks):
            log_p = bridged(batch.tokens, return_type="logits")[0].log_softmax(-1)
        own = -log_p.gather(1, batch.targets[0, :, None])[:, 0].double()
        losses.append(own[boundaries.column[n] : boundaries.last[n] + 1].sum().item())
        first.append(log_p[at].numpy())
    return np.array(losses), np.array(first)


@pytest.fixture(scope="module")
def soft(probed_run: Run, boundaries: Boundaries) -> EditedLM:
    return EditedLM(probed_run, "soft", boundaries, [HEADS, ("hook_resid_post", 1)])


def assert_outcomes(found: Outcomes, expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(found.next_loss, expected[0], atol=5e-4)
    np.testing.assert_allclose(found.first, expected[1], atol=5e-4)


def test_edits_of_a_conditioned_variant_come_behind_the_adapter(
    probed_run: Run, boundaries: Boundaries, soft: EditedLM
):
    assert "blocks.2.attn.hook_z" in probed_run.model("soft").adapter.names
    assert_outcomes(soft.outcomes(), conditioned_by_hand(probed_run, boundaries, None))
    # What replaces the activation after the adapter is all that is there: the plan is gone.
    for change in (pushed, lambda x, n, d: torch.zeros_like(x)):
        found = soft.outcomes(Edit(HEADS, (1,), change))
        assert_outcomes(found, conditioned_by_hand(probed_run, boundaries, change))


def test_another_plan_is_that_of_the_next_sentence_alone(
    probed_run: Run, boundaries: Boundaries, soft: EditedLM
):
    target = (boundaries.label + 3) % probed_run.corpus.k
    codebook = soft.codebook
    assert codebook is not None

    def mixing(n: int) -> Any:
        def mix(scores: Tensor, actions: Tensor, book: Tensor, temperature: Any) -> Tensor:
            embeddings = VARIANTS["soft"].evaluation(scores, actions, book, temperature)
            tokens = boundaries.windows.start[n] + np.arange(boundaries.windows.length[n]) + 1
            touched = np.unique(np.searchsorted(probed_run.corpus.first_token, tokens, side="right") - 1)
            (row,) = np.flatnonzero(touched == boundaries.sentence[n])
            embeddings[row] = book[target[n]]
            return embeddings

        mix.needs_scores = True  # type: ignore[attr-defined]
        return mix

    plan = Edit(None, (1,), lambda x, n, d: codebook[torch.from_numpy(target[n])])
    found = soft.outcomes(plan)
    assert_outcomes(found, conditioned_by_hand(probed_run, boundaries, None, mixing))
    assert np.abs(found.next_loss - soft.outcomes().next_loss).max() > 1e-4
