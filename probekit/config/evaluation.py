"""Settings of what is measured: perplexity, multiple choice, generated text."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from probekit.config.base import Positive, Seed, Settings, Several


def _no_overflow(temperature: float) -> float:
    if 0.0 < temperature < 1e-3:
        raise ValueError(f"{temperature:g} is too low to divide by; give 0.001 or more, or 0")
    return temperature


class EvaluationSettings(Settings):
    """How perplexity is measured and resampled."""

    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens in an evaluation window; unset: the training window."""
    stride: Positive | None = None
    """Tokens by which windows advance; each window scores its last `stride` tokens. Unset: half a window."""
    batch_size: Positive = 32
    """Windows in one forward pass."""
    resamples: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap resamples of documents for every 95 % interval."""
    questions: Positive = 400
    """Multiple-choice questions (`method: depth-ensemble`): which of four sentences of a test document comes
    next."""
    questions_file: str | None = None
    """JSON lines of `question`, `choices` and `answer`, asked in place of those."""


class GenerationSettings(Settings):
    """How text is generated, and how generated text is measured."""

    prompts: Positive = 200
    """Test documents whose beginnings are continued, for the metrics; those too short are passed over."""
    context: Positive = 128
    """A prompt goes on to the first end of a sentence behind this many tokens of its document."""
    lengths: Several[Positive] = (128, 256)
    """Tokens of a continuation at which it is compared with the true one; the longest is how many are
    generated."""
    samples: Positive = 500
    """Texts generated with no prompt, for MAUVE and latent perplexity."""
    temperature: Annotated[float, Field(ge=0.0), AfterValidator(_no_overflow)] = 1.0
    """Divides the LM's logits before a token is drawn, at least 0.001; 0 takes the most probable one."""
    top_k: Positive | None = None
    """Draw among this many most probable tokens only."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Draw among the fewest most probable tokens whose probabilities add up to this."""
    batch_size: Positive = 32
    """Texts generated at once."""
    seeds: Several[Seed] | None = None
    """Seeds of what is drawn; metrics are told for each. Unset: the run's seed."""
