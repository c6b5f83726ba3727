"""A drawing of the planner-conditioned LM (Figure 1 of arXiv 2410.12492), from the parts of a trained one.

Numbers, conditioned layers and the way of mixing are the model's own; here is only where they stand.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise

from drawing import Box, Drawing, Wire, draw, empty_figure, frame
from matplotlib.figure import Figure

from probekit.config import VariantName
from probekit.models import mixing
from probekit.models.hook_points import layer_of
from probekit.run.run import Run

PLAN, BUS, STACK = 0.0, 4.1, 8.2
"""Columns of the drawing: x of the planner's way, of the action's way to the layers, of the LM."""
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
"""What each way of mixing does."""


TUNING = {"frozen": "frozen", "lora": "with LoRA", "full": "tuned"}
"""What becomes of the base LM, by the setting `training.base.tuning`."""


@dataclass(frozen=True)
class Structure:
    """What the drawing tells of a model.

    Attributes:
        variant: Its way of choosing the action.
        mixing: What that does in training.
        planned: Whether that takes the planner's scores.
        joint: Whether the planner is trained on the next-token loss.
        actions: Actions of the codebook.
        dimensions: Of an action's or a sentence's embedding.
        planner_layers: Layers of the planner.
        planner_heads: Attention heads of the planner.
        planner_width: Width of the planner.
        planner_parameters: Parameters of the planner.
        layers: Layers of the LM.
        width: Width of the LM.
        lm_parameters: Parameters of the LM.
        tuning: What became of these, see `TUNING`.
        conditioned: Layers at which the action enters; none where it enters with the tokens.
        enters: How it does.
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

    @classmethod
    def of(cls, run: Run, variant: VariantName) -> Structure:
        """Reads it off a run's trained model.

        Raises:
            ProbekitError: The run has no such variant, or it is not trained.
        """
        model = run.model(variant)
        assert model.adapter is not None and model.planner is not None  # noqa: S101, PT018 - it is trained
        names, planner = model.adapter.names, model.planner
        actions, dimensions = model.adapter.codebook.shape
        inside = tuple(
            layer for name in names if name.startswith("blocks.") and (layer := layer_of(name)) is not None
        )
        chosen = mixing.VARIANTS[variant]
        location = names[0].split(".", 2)[-1] if inside else names[0]
        return cls(
            variant=variant,
            mixing=MIXING[type(chosen.training)],
            planned=chosen.training.needs_scores,
            joint=chosen.joint and run.config.training.joint.end_to_end,
            actions=actions,
            dimensions=dimensions,
            planner_layers=run.config.planner.layers,
            planner_heads=run.config.planner.heads,
            planner_width=planner.read.out_features,
            planner_parameters=sum(p.numel() for p in planner.parameters()),
            layers=model.bridged.cfg.n_layers,
            width=model.bridged.cfg.d_model,
            lm_parameters=sum(p.numel() for p in model.bridged.original_model.parameters()),
            tuning=run.config.training.base.tuning,
            conditioned=inside,
            enters="planning token\nbefore a sentence" if model.adapter.inserts else f"added at\n{location}",
            adapter_parameters=sum(p.numel() for p in model.adapter.parameters()),
        )

    def rows(self) -> list[dict[str, object]]:
        """What the drawing shows, as a table."""
        return [{"fact": name, "value": value} for name, value in asdict(self).items()]


def method_figure(structure: Structure) -> Figure:
    """The drawing on a figure of its own."""
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
    entries = [box.at[1] for box in layers if box.kind == "adapter"] or [EMBEDDING]
    heights = [0.3, EMBEDDING, *(box.at[1] for box in layers), end]
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
