"""The logit lens against the LM's own logits, and hidden states decoded by hand."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from probekit.errors import ProbekitError
from probekit.probing.activations import ActivationReader
from probekit.probing.grid import TESTED_ON, make_grid
from probekit.probing.labels import target_of
from probekit.probing.logit_lens import LogitLens
from probekit.probing.probe import probe
from probekit.run.run import Run

SETTINGS = {
    "probe.target": "token",
    "probe.anchors": "token",
    "probe.positions": [1, 2],
    "probe.solvers": ["ridge", "logit-lens"],
    "probe.variants": ["none", "random"],
    "evaluation.resamples": 100,
}


def test_at_the_last_layer_it_is_the_lm_itself(tiny_run: Run):
    """At earlier layers the head of their hidden states; GPT-2 normalises those of the last block alone."""
    run = tiny_run.with_settings(SETTINGS)
    corpus, target = run.corpus, target_of(run.corpus, run.config)
    grid = make_grid(corpus, run.config.probe, target, 0)
    reader = ActivationReader(run, "none", [("hook_resid_post", layer) for layer in range(3)], [1])
    test = grid.examples[TESTED_ON]
    within = test.start - corpus.document_tokens[test.document] < reader.windows[0]
    examples = test[np.flatnonzero(within)[:300]]
    found = reader.logit_lens(target.tokens).log_probabilities(reader.read(examples)[0][:, 0])
    model, ids = run.plain_model(), torch.from_numpy(target.tokens)
    for document in np.unique(examples.document):
        first, last = corpus.document_tokens[document : document + 2]
        tokens = torch.from_numpy(
            np.asarray(corpus.tokens[first : min(last, first + reader.windows[0])]).astype(int)
        )
        with torch.no_grad():
            output = model(tokens[None], output_hidden_states=True)
            heads = [model.lm_head(model.transformer.ln_f(state)) for state in output.hidden_states[1:-1]]
        rows = np.flatnonzero(examples.document == document)
        at = examples.start[rows] - first - 1
        for layer, logits in enumerate([*heads, output.logits]):
            expected = logits[0, at][:, ids].log_softmax(-1)
            torch.testing.assert_close(found[layer][rows], expected, rtol=1e-4, atol=1e-4)


def test_it_is_a_solver_like_others(tiny_run: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    table = probe(run, SETTINGS, quiet=True).table
    lens = table[table.solver == "logit-lens"]
    assert len(lens) == 2 * 3 * 2
    assert lens[["bits_low", "gain_low", "validation_cross_entropy"]].notna().all(axis=None)
    assert lens[["selectivity", "l2", "code_length"]].isna().all(axis=None)
    near = lens[(lens.variant == "none") & (lens.position == "1")].set_index("layer")
    far = lens[(lens.variant == "none") & (lens.position == "2")].set_index("layer")
    assert near.cross_entropy[2] < far.cross_entropy[2], (
        "the LM predicts the token here, not the one after it"
    )
    assert (abs(near.validation_cross_entropy - near.cross_entropy) < 0.3).all()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"probe.target": "action", "probe.anchors": "start"}, "probe.target is 'action'"),
        ({"probe.locations": ["hook_resid_post", "hook_mlp_out"]}, "probe.locations has 'hook_mlp_out'"),
    ],
)
def test_it_reads_tokens_from_the_residual_stream_alone(tiny_run: Run, changed: dict, said: str):
    with pytest.raises(
        ProbekitError, match=rf"^probe\.solvers has logit-lens, .* {said}; give probe\.target token"
    ):
        probe(tiny_run.with_settings(SETTINGS | changed), quiet=True)


# The tuned lens


def test_the_tuned_lens_finds_an_affine_map():
    """Activations are the last layer's in other axes, shifted: a map leads back."""
    generator = torch.Generator().manual_seed(0)
    width, classes = 6, 9
    last = torch.randn(1, 3000, width, generator=generator)
    turned = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    X = torch.cat([last, 40 * last @ turned + torch.arange(width)])
    lens = LogitLens(torch.nn.LayerNorm(width), torch.randn(classes, width, generator=generator), None)
    labels = torch.distributions.Categorical(logits=lens.log_probabilities(last)[0]).sample()
    fit, choose, test = slice(0, 2000), slice(2000, 2500), slice(2500, 3000)
    teachers = [last[:, rows].expand(2, -1, -1) for rows in (fit, choose)]
    given = X[:, fit], labels[fit], classes, X[:, choose], labels[choose]
    tuned, plain = lens.tuned(teachers, 0).fit(*given), lens.fit(*given)
    truth = lens.log_probabilities(last[:, test])
    found = tuned.log_probabilities(X[:, test])
    divergence = (truth.exp() * (truth - found)).sum(2).mean(1)
    assert divergence[0] == pytest.approx(0, abs=1e-6), "the last layer learns nothing"
    assert tuned.n_iter_[0] == 0
    without = (truth.exp() * (truth - lens.log_probabilities(X[:, test]))).sum(2).mean(1)
    assert divergence[1] < 0.1 * without[1]
    assert divergence[1] == pytest.approx(float(tuned.divergence_[1]), abs=0.02)
    assert tuned.validation_loss_[1] < plain.validation_loss_[1]


def test_on_a_run_it_is_nearer_to_the_last_layer(tiny_run: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    settings = SETTINGS | {"probe.solvers": ["logit-lens", "tuned-lens"], "probe.variants": ["none"]}
    table = probe(run, settings | {"probe.positions": [1], "probe.control": False}, quiet=True).table
    lens, tuned = (table[table.solver == name].set_index("layer") for name in ("logit-lens", "tuned-lens"))
    assert tuned.cross_entropy[2] == pytest.approx(lens.cross_entropy[2], rel=1e-5)
    assert tuned.iterations[2] == 0
    apart, tuned_apart = ((found.cross_entropy - lens.cross_entropy[2]).abs() for found in (lens, tuned))
    assert (tuned_apart[:2] < apart[:2]).all()
    with pytest.raises(ProbekitError, match=r"^probe\.solvers has tuned-lens, .* give 2 in probe\.layers"):
        probe(run.with_settings(settings | {"probe.layers": [0]}), quiet=True)
