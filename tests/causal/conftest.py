"""Runs whose truth is known: heads that alone carry what is read of the next sentence."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from probekit.probing.activations import ActivationReader
from probekit.probing.probe import probe
from probekit.probing.targets import find_examples, find_target
from probekit.progress import without_bars_of_transformers
from probekit.run.run import Run

WIDTH, SIZE = 32, 16
"""Of the tiny run's residual stream and of each of its two heads."""


@pytest.fixture
def planted(probed_copy: Run, quick_probes: dict[str, Any]) -> Callable[[dict[tuple[int, int], slice]], Run]:
    """Makes the run one in which some heads alone write, each into some features; the first tells actions."""
    last = {"probe.layers": [2], "probe.positions": [1], "probe.l2": [0.01, 0.1]}
    return lambda heads: _planted(probed_copy, heads, quick_probes | last)


def _planted(run: Run, heads: dict[tuple[int, int], slice], probes: dict[str, Any]) -> Run:
    """All heads have the mean of what was read before; sentences get the action that the first one tells.

    What stands right before a sentence is a full stop, whose own embedding tells nothing of that.
    """
    model = run.plain_model()
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            for module in (block.mlp.c_proj, block.attn.c_attn, block.attn.c_proj):
                module.weight.zero_()
                module.bias.zero_()
            for head in range(2):
                # Queries and keys are zero: every position gets the same attention. Both heads read the same.
                first = 2 * WIDTH + SIZE * head
                block.attn.c_attn.weight[:SIZE, first : first + SIZE] = 3 * torch.eye(SIZE)
            for (own_layer, head), features in heads.items():
                if own_layer == layer:
                    size = features.stop - features.start
                    drawn = torch.randn(SIZE, size, generator=torch.Generator().manual_seed(layer))
                    block.attn.c_proj.weight[SIZE * head : SIZE * (head + 1), features] = drawn
    with without_bars_of_transformers():
        model.save_pretrained(run.folder / "lm")
    _tell(Run.open(run.folder), *next(iter(heads)))
    changed = Run.open(run.folder)
    # No longer the planted ones: no ceiling is known.
    unplanted = {"probe.variants": ["none"], "actions.labels": "clusters"}
    probe(changed, probes | unplanted, quiet=True)
    return changed


def _tell(run: Run, layer: int, head: int) -> None:
    """Gives every sentence the action that a head tells right before it, as a linear probe would read it."""
    corpus = run.corpus
    target = find_target(corpus, "action")
    examples = find_examples(corpus, np.arange(len(corpus.split)), target, (1,), "start")
    chunks = ActivationReader(run, "none", [("attn.hook_z", layer)], (1,)).chunks(examples)
    z = torch.cat([block[0, 0] for _, (block,) in chunks])[:, SIZE * head : SIZE * (head + 1)]
    drawn = torch.randn(SIZE, corpus.k, generator=torch.Generator().manual_seed(0))
    actions = corpus.actions.copy()
    actions[examples.sentence] = (((z - z.mean(0)) / z.std(0)) @ drawn).argmax(dim=1).numpy()
    np.save(run.folder / "corpus" / "actions.npy", actions)
