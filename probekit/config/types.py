"""Types that settings share, and the base of all sections."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from probekit.config.positions import Position, as_position

T = TypeVar("T")


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} is listed twice")
    return values


def _ascending(values: tuple[int, int]) -> tuple[int, int]:
    if values[0] > values[1]:
        raise ValueError(f"the fewest, {values[0]}, exceed the most, {values[1]}")
    return values


def _not_one(value: int) -> int:
    if value == 1:
        raise ValueError("1 is not enough; give 0, or 2 and more")
    return value


def _no_overflow(temperature: float) -> float:
    if 0.0 < temperature < 1e-3:
        raise ValueError(f"{temperature:g} is too low to divide by; give 0.001 or more, or 0")
    return temperature


TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".gz", ".zst")
"""Endings of tables of labels; what has none of them may be a dataset."""


def _absolute(path: str | None) -> str | None:
    # Not Path's own `expanduser`, which raises where there is no such user.
    found = None if path is None else os.path.expanduser(path)  # noqa: PTH111
    if found is None or not (os.path.exists(found) or found.endswith(TABLE_ENDINGS)):  # noqa: PTH110
        return path  # a dataset's name on the hub
    return str(Path(found).absolute())


def _compression(text: str) -> str:
    kind, _, amount = text.partition("=")
    amounts = {"prune": (float, 0, 1), "rank": (int, 1, LARGEST)}
    if text != "int8":
        try:
            number, low, end = amounts[kind]
            valid = low <= number(amount) < end
        except (KeyError, ValueError):
            valid = False
        if not valid:
            raise ValueError(
                f"{text!r} must be int8, prune=SHARE from 0 to below 1, or rank=NUMBER from 1 on"
            )
    return text


LARGEST = 2**31 - 1
"""No whole number is larger: counts and positions are added up in 64 bits."""

HUGE = 1e12
"""No other number is larger: its square is finite in float32."""

Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NoneOrTwo = Annotated[int, Field(ge=0, le=LARGEST), AfterValidator(_not_one)]
AtLeastTwo = Annotated[int, Field(ge=2, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveNumber = Annotated[float, Field(gt=0.0, le=HUGE)]
Weight = Annotated[float, Field(ge=0.0, le=HUGE)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveShare = Annotated[float, Field(gt=0.0, lt=1.0)]
Temperature = Annotated[float, Field(ge=0.0), AfterValidator(_no_overflow)]
Column = Annotated[str, Field(min_length=1)]
Compression = Annotated[str, AfterValidator(_compression)]
LabelsPath = Annotated[str | None, AfterValidator(_absolute)]
ReadAt = Annotated[Position, BeforeValidator(as_position)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
Several = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(_distinct)]

VariantName = Literal[
    "none",
    "fixed",
    "uniform",
    "oracle",
    "predicted",
    "mixed",
    "straight-through",
    "gumbel",
    "soft",
    "joint",
]
ProbedName = Literal[VariantName, "random"]
SolverName = Literal["softmax", "ridge", "lda", "mean-difference", "l1", "mlp", "logit-lens", "tuned-lens"]
MemberName = Literal["plain", "repeated", "ensemble", "distilled"]
ModelName = VariantName | MemberName
BosRule = Literal["every-window", "document", "none"]
"""Where an LM reads a beginning-of-sequence token."""


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") else [*value] if isinstance(value, range) else value


class Settings(BaseModel):
    """Base of all sections: frozen, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """Paths as text, arrays and numbers of NumPy as Python's own, ranges as lists."""
        return {name: _plain(value) for name, value in values.items()} if isinstance(values, dict) else values
