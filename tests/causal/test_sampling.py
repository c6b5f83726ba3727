"""Sentences written anew: what is drawn, where they end, and which action they have."""

from typing import Any

import numpy as np
import pytest
import torch

from probekit.causal.intervene import MOST_TOKENS, Writer
from probekit.causal.scenes import Edit, Stage, draw_scenes
from probekit.data.sentences import complete_spans
from probekit.models.conditioning import CONDITIONINGS, new_adapter
from probekit.models.replanning import decoded
from probekit.probing.results import Cell, SavedProbes
from probekit.run.run import Run

WINDOW = 48
PLACE, LAST = ("hook_resid_post", 0), ("hook_resid_post", 2)


def stage_of(run: Run, variant: str, count: int = 8) -> Stage:
    scenes = draw_scenes(run.corpus, run.corpus.documents("test"), count, WINDOW, 3, 0)
    probe = SavedProbes(run.folder / "probes", variant, 0)[Cell(*LAST, 1)]
    return Stage(run, variant, scenes, [PLACE, LAST], (LAST, probe))


@pytest.fixture(scope="module")
def written(probed_run: Run) -> tuple[Stage, Writer, list[np.ndarray]]:
    stage = stage_of(probed_run, "none")
    writer = Writer(probed_run, stage, 8, WINDOW)
    return stage, writer, writer._write(np.arange(8), None)


@pytest.mark.parametrize("edited", [False, True])
def test_tokens_are_drawn_by_the_scenes_own_numbers_while_the_edit_holds_its_place(
    edited: bool, probed_run: Run, written
):
    stage, writer, texts = written
    added = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    if edited:
        edit = Edit(PLACE, (1, 3), lambda x, n, d: x + added / d)
        plain, texts = texts, writer._write(np.arange(8), edit)
        assert not all(np.array_equal(a, b) for a, b in zip(plain, texts, strict=True))
    model, scenes, corpus = probed_run.plain_model().eval(), stage.scenes, probed_run.corpus
    special = torch.tensor(corpus.tokenizer.all_special_ids)
    for n, text in enumerate(texts):
        uniforms = np.random.default_rng([0, n]).random(MOST_TOKENS)
        start = scenes.windows.start[n]
        tokens = corpus.tokens[start : corpus.first_token[scenes.sentence[n]]].astype(np.int64).tolist()
        boundary = len(tokens)

        def change(module: Any, inputs: Any, output: Any, boundary: int = boundary) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for distance in (1, 3):
                hidden[0, boundary - distance] += added / distance
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = model.transformer.h[0].register_forward_hook(change) if edited else None
        for step, token in enumerate(text):
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1].double()
            logits[special] = -torch.inf
            reached = logits.softmax(-1).cumsum(-1)
            assert token == int((reached > uniforms[step] * reached[-1]).to(torch.int8).argmax())
            tokens.append(int(token))
        if handle:
            handle.remove()


def test_they_end_with_the_sentence(probed_run: Run, written):
    _, writer, texts = written
    assert any(len(text) < writer._most for text in texts)
    for n, text in enumerate(texts):
        context = decoded(probed_run.corpus.tokenizer, writer._context(n))

        def over(tokens: np.ndarray, context: str = context, n: int = n) -> int:
            whole = decoded(probed_run.corpus.tokenizer, [*writer._context(n), *tokens])
            return len(complete_spans(whole)) - len(complete_spans(context))

        assert over(text) == 1 or len(text) == writer._most
        assert all(over(text[:length]) <= 0 for length in range(1, len(text)))


def test_actions_are_the_nearest_centroids(probed_run: Run, written):
    _, writer, texts = written
    corpus = probed_run.corpus
    found = writer.actions()
    whole = [n for n, text in enumerate(texts) if len(text) < writer._most]
    sentences = [decoded(corpus.tokenizer, texts[n]).strip() for n in whole]
    expected = corpus.codebook.nearest(probed_run.encoder().encode(sentences))
    np.testing.assert_array_equal(found[whole], expected)


@pytest.mark.parametrize("kind", sorted(CONDITIONINGS))
def test_a_conditioned_variant_writes_under_the_plan_that_it_is_given(
    kind: str, probed_run: Run, monkeypatch: pytest.MonkeyPatch
):
    """Every kind of conditioning reads a growing text as it reads the true one: same tokens, same logits."""
    stage = stage_of(probed_run, "soft", 4)
    if kind != probed_run.config.conditioning.kind:
        run = probed_run.with_settings({"conditioning.kind": kind})
        model = stage._model
        centroids = torch.from_numpy(run.corpus.codebook.centroids)
        model.adapter = new_adapter(run.config.conditioning, centroids, run.base_lm(), 0).requires_grad_(
            False
        )
        stage._backend = run.forward_pass([*model.names, "blocks.2.hook_resid_post"])
    writer, scenes, rows = Writer(probed_run, stage, 4, WINDOW), stage.scenes, np.arange(4)
    whole = stage.predict(stage.read(scenes.windows[rows]), rows, None).logits
    begun = writer._begun(rows)
    true = stage.read(scenes.windows[rows])
    for n in range(4):
        own = range(scenes.column[n] + 1, scenes.last[n] + 1)
        begun.tokens[n, list(own)] = true.tokens[n, list(own)]
    grown = stage.predict(begun, rows, None).logits
    for n in range(4):
        own = slice(scenes.column[n], scenes.last[n] + 1)
        torch.testing.assert_close(grown[n, own], whole[n, own], atol=1e-4, rtol=1e-4)
