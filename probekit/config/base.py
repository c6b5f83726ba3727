"""What settings are made of: the base of all sections, kinds of values, names that can be chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

T = TypeVar("T")


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} is listed twice")
    return values


Share = Annotated[float, Field(ge=0.0, lt=1.0)]
SomeShare = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
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
SolverName = Literal["softmax", "ridge", "lda", "mlp"]
MemberName = Literal["plain", "repeated", "ensemble", "distilled"]
ModelName = VariantName | MemberName


class Settings(BaseModel):
    """Base of all sections: frozen, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_values_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is not what this setting takes")
        return value
