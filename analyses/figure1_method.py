"""Figure 1 of arXiv 2410.12492: the planner-conditioned LM, drawn from a trained model's own parts.

    python analyses/figure1_method.py runs/demo --variant joint

A folder that does not exist is trained from `--preset` first. The CSV lists what the drawing shows.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from shared.drawing import Box, Drawing, Wire, draw, empty_figure, frame
from shared.script import run_script, save_figure, script_parser

import probekit
from probekit.config import VariantName
from probekit.models import mixing
from probekit.models.locations import layer_of
from probekit.run.run import Run

PLAN, BUS, STACK = 0.0, 4.1, 8.2
"""Columns of the drawing: x of the planner, of the wires from the action to the layers, of the LM."""
EMBEDDING, FIRST_LAYER = 1.75, 2.9
"""Heights of the LM's embedding and first layer."""
STEP = 1.0
"""Height from a layer to the next."""

MIXING: dict[type, str] = {
    mixing.Fixed: "one constant action",
    mixing.Uniform: "mean of the codebook",
    mixing.Oracle: "the true action",
    mixing.Predicted: "argmax of the scores",
    mixing.Mixed: "planner's action or the true one",
    mixing.Soft: "softmax(scores / T) · codebook",
    mixing.StraightThrough: "argmax, gradient of softmax",
    mixing.GumbelSoftmax: "softmax((scores + noise) / T) · codebook",
}
"""What each kind of mixing does, in words."""

TUNING = {"frozen": "frozen", "lora": "with LoRA", "full": "tuned"}
"""How the base LM is trained, by the setting `training.base.tuning`."""


class Structure(NamedTuple):
    """What the drawing shows of a model.

    Attributes:
        variant: The variant.
        mixing: Its mixing in training, in words.
        planned: Whether mixing needs the planner's scores.
        joint: Whether the planner is trained on the next-token loss.
        actions: Actions of the codebook.
        dimensions: Dimensions of the embeddings of actions and sentences.
        planner_layers: Layers of the planner.
        planner_heads: Attention heads of the planner.
        planner_width: Width of the planner.
        planner_parameters: Parameters of the planner.
        layers: Layers of the LM.
        width: Width of the LM.
        lm_parameters: Parameters of the LM.
        tuning: How the LM was trained, see `TUNING`.
        conditioned: Layers at which the action enters; none where it enters with the tokens.
        enters: Where it enters, in words.
        adapter_parameters: Parameters of codebook and projections.
    """

    variant: str
    mixing: str
    planned: bool
    joint: bool
    actions: int
    dimensions: int
    planner_layers: int
    planner_heads: int
    planner_width: int
    planner_parameters: int
    layers: int
    width: int
    lm_parameters: int
    tuning: str
    conditioned: tuple[int, ...]
    enters: str
    adapter_parameters: int


def structure_of(run: Run, variant: VariantName) -> Structure:
    """Reads the structure from a run's trained model.

    Raises:
        ProbekitError: The run has no such variant, or it is not trained.
    """
    model, lm = run.model(variant), run.frozen_lm(variant)
    assert model.adapter is not None and model.planner is not None  # noqa: S101, PT018 - it is trained
    names, planner, chosen = model.adapter.names, model.planner, mixing.VARIANTS[variant]
    actions, dimensions = model.adapter.codebook.shape
    conditioned = tuple(
        layer for name in names if name.startswith("blocks.") and (layer := layer_of(name)) is not None
    )
    location = names[0].split(".", 2)[-1] if conditioned else names[0]
    return Structure(
        variant=variant,
        mixing=MIXING[type(chosen.training)],
        planned=chosen.training.needs_scores,
        joint=chosen.joint and run.config.training.joint.end_to_end,
        actions=actions,
        dimensions=dimensions,
        planner_layers=run.config.planner.layers,
        planner_heads=run.config.planner.heads,
        planner_width=planner.read.out_features,
        planner_parameters=_count(planner),
        layers=lm.layers,
        width=lm.config.hidden_size,
        lm_parameters=_count(model.backend.model),
        tuning=run.config.training.base.tuning,
        conditioned=conditioned,
        enters="planning token\nbefore a sentence" if model.adapter.inserts else f"added at\n{location}",
        adapter_parameters=_count(model.adapter),
    )


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def method_figure(structure: Structure) -> Figure:
    """Draws the model."""
    end = FIRST_LAYER + structure.layers * STEP
    figure, axes = empty_figure(-3.1, STACK + 5.2, -1.0, max(end + 2.1, 11.0))
    frame(axes, (-2.75, 1.2), 5.5, 4.5)
    frame(axes, (STACK - 1.95, 1.2), 3.9, end - 0.6)
    draw(axes, _planner(structure) + _mixing(structure) + _language_model(structure, end))
    return figure


def _planner(s: Structure) -> Drawing:
    """From the sentences so far to the scores of the next one's action."""
    layers = f"{s.planner_layers} layer{'s' * (s.planner_layers > 1)}, {s.planner_heads} heads"
    return Drawing(
        boxes=(
            Box((PLAN, 0.3), "sentences 1 to j − 1", 4.4),
            Box((PLAN, 1.85), f"sentence encoder, {s.dimensions} dim.", 5.0, "optional"),
            Box((PLAN, 3.45), f"planner\n{layers}, width {s.planner_width}", 5.0, height=1.2),
            Box((PLAN, 5.0), f"scores of {s.actions:,} actions", 4.4),
        ),
        wires=tuple(
            Wire(((PLAN, low), (PLAN, high))) for low, high in ((0.66, 1.49), (2.21, 2.85), (4.05, 4.64))
        ),
    )


def _mixing(s: Structure) -> Drawing:
    """From scores to the embedding that conditions, and on to the layers."""
    entries = [FIRST_LAYER + layer * STEP for layer in s.conditioned] or [EMBEDDING]
    turns = tuple(
        Wire(((PLAN + 2.5, 9.4), (BUS, 9.4), (BUS, y), (STACK - 1.6, y)), "adapter") for y in entries
    )
    gradient = (Wire(((PLAN - 2.1, 7.39 - 0.36), (PLAN - 2.1, 5.36)), "gradient"),) if s.joint else ()
    notes: tuple[tuple[tuple[float, float], str], ...] = (
        ((BUS + 0.3, 10.2), f"adapter: codebook and projections\n{_short(s.adapter_parameters)} parameters"),
        ((PLAN, -0.5), f"planner: {_short(s.planner_parameters)} parameters"),
    )
    if s.joint:
        notes += (((PLAN - 0.55, 6.25), "gradient of the\nnext-token loss"),)
    return Drawing(
        boxes=(
            Box((PLAN, 7.39), f"mixing ({s.variant})\n{s.mixing}", 5.6, "adapter", 1.2),
            Box((PLAN, 9.4), f"action embedding, {s.dimensions} dim.", 5.0, "adapter"),
        ),
        wires=(
            *((Wire(((PLAN + 1.2, 5.36), (PLAN + 1.2, 6.79))),) if s.planned else ()),
            Wire(((PLAN, 7.99), (PLAN, 9.04)), "adapter"),
            *turns,
            *gradient,
        ),
        notes=notes,
    )


def _language_model(s: Structure, end: float) -> Drawing:
    """From tokens to next-token logits, layer by layer; the unembedding is at a height."""
    layers = [
        Box(
            (STACK, FIRST_LAYER + layer * STEP),
            f"layer {layer}",
            3.2,
            "adapter" if layer in s.conditioned else "model",
            0.66,
        )
        for layer in range(s.layers)
    ]
    entries = [box.centre[1] for box in layers if box.kind == "adapter"] or [EMBEDDING]
    heights = [0.3, EMBEDDING, *(box.centre[1] for box in layers), end]
    return Drawing(
        boxes=(
            Box((STACK, 0.3), "tokens up to t", 3.4),
            Box(
                (STACK, EMBEDDING), f"embedding, {s.width} dim.", 3.4, "model" if s.conditioned else "adapter"
            ),
            *layers,
            Box((STACK, end), "unembedding", 3.2, height=0.66),
        ),
        wires=(
            *(Wire(((STACK, low + 0.34), (STACK, high - 0.34))) for low, high in pairwise(heights)),
            Wire(((STACK, end + 0.33), (STACK, end + 1.1))),
        ),
        notes=(
            ((STACK, end + 1.4), "logits of token t + 1"),
            ((STACK, -0.5), "t + 1 is in sentence j"),
            ((STACK + 3.55, end), f"LM, {TUNING[s.tuning]}\n{_short(s.lm_parameters)} parameters"),
            ((STACK + 3.55, sum(entries) / len(entries)), s.enters),
        ),
    )


def _short(count: int) -> str:
    """A number of parameters, in thousands or millions."""
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def main() -> None:
    """Trains what is missing, draws, saves."""
    parser = script_parser(__doc__, "figures/figure1_method.png")
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"), help="a run (runs/demo)")
    parser.add_argument("--preset", default="demo", help="settings of a run that does not exist (demo)")
    parser.add_argument("--variant", help="whose model (the last of the run's variants)")
    given = parser.parse_args()
    if given.run.exists():
        run = probekit.load_run(given.run)
    else:
        run = probekit.train(probekit.Config.from_preset(given.preset), given.run)
    structure = structure_of(run, given.variant or (run.variants or ["joint"])[-1])
    facts = pd.DataFrame(structure._asdict().items(), columns=["fact", "value"])
    save_figure(method_figure(structure), facts, given.out, {"variant": structure.variant}, [run])


if __name__ == "__main__":
    run_script(main)
