"""Drawing tokens from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from probekit.config import GenerationSettings


def draw(logits: Tensor, uniforms: Tensor, settings: GenerationSettings) -> Tensor:
    """Draws a token for each text `[texts]`.

    `top_p` counts what `top_k` leaves as all there is, and keeps the token that crosses it.

    Args:
        logits: `[texts, vocabulary]`; minus infinity is never drawn.
        uniforms: Numbers from 0 to 1, without 1, one for each text `[texts]`: what is drawn of a text depends
            on its own alone. Not used where the temperature is 0.
        settings: Temperature, `top_k`, `top_p`.
    """
    if settings.temperature == 0.0:
        return logits.argmax(dim=-1)
    scaled, tokens = logits.double() / settings.temperature, None
    if settings.top_k or settings.top_p:
        scaled, tokens = scaled.topk(min(settings.top_k or logits.shape[1], logits.shape[1]), dim=-1)
    probabilities = scaled.softmax(dim=-1)
    if settings.top_p:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= settings.top_p, 0.0)
    reached = probabilities.cumsum(dim=-1)
    wanted = uniforms[:, None] * reached[:, -1:]
    # The first that reaches beyond: one of probability 0 never is.
    place = (reached > wanted).to(torch.uint8).argmax(dim=-1, keepdim=True)
    return (place if tokens is None else tokens.gather(1, place))[:, 0]
