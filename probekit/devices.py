"""Where and in which arithmetic to compute."""

from __future__ import annotations

import contextlib

import torch

from probekit import processes
from probekit.errors import ProbekitError


def compute_device(name: str) -> torch.device:
    """The device that the setting `device` names.

    Raises:
        ProbekitError: It is not a device, or this machine has none of it.
    """
    if (own := processes.device()) is not None:
        if name not in ("auto", own.type):
            raise ProbekitError(
                f"device is {name!r}, but of several processes each has its own, here {own}; give auto, or "
                "set CUDA_VISIBLE_DEVICES to nothing for the CPU"
            )
        return own
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ProbekitError(
            f"device is {name!r}: it cannot be used here ({reason}); use auto or cpu"
        ) from None
    return device


def autocast(
    device: torch.device, precision: str, *, keep_casts: bool = True
) -> contextlib.AbstractContextManager[None]:
    """The forward pass's arithmetic that the setting `training.precision` names.

    Args:
        device: Where to compute.
        precision: The setting.
        keep_casts: Keep trained weights that were cast until the end of the pass.
    """
    enabled = precision_of(device, precision) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=keep_casts)


def precision_of(device: torch.device, precision: str) -> str:
    """What the setting `training.precision` comes to on a device: float32 or bfloat16."""
    if precision != "auto":
        return precision
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bfloat16" if has_bfloat16 else "float32"
