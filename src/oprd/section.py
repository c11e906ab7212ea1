"""What the classes of a recipe share: strict pydantic models and the value types that several of them use."""

import inspect
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PlainSerializer,
    PositiveFloat,
    Tag,
    WithJsonSchema,
    model_validator,
)
from transformers import PreTrainedTokenizerBase

from oprd.types import TokenSelection


class Section(BaseModel):
    """A part of a recipe: frozen, strict about types, without unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, validate_default=True,
        validate_by_name=True, validate_by_alias=True, arbitrary_types_allowed=True, serialize_by_alias=True,
        allow_inf_nan=False,
    )  # fmt: skip


PositiveInt = Annotated[int, Field(gt=0, le=2**40)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**40)]
Minutes = Annotated[str, Field(pattern=r"^[1-9]\d* min$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


TEMPLATE_ARGUMENTS = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
"""What this program and transformers give a chat template themselves."""


def _check_template_options(options: dict[str, Any]) -> dict[str, Any]:
    if taken := TEMPLATE_ARGUMENTS.intersection(options):
        raise ValueError(f"{min(taken)!r} is set by the program; give variables of the chat template alone")
    return options


TemplateOptions = Annotated[dict[str, bool | int | float | str], AfterValidator(_check_template_options)]
"""Variables that a chat template reads, such as `{enable_thinking: false}`."""


class OwnPrompt(Section):
    """Another prompt for one model."""

    system_prompt: str | None = None
    """Replaces the system message; `{column}` is filled from the dataset."""
    prompt_template: str | None = None
    """Replaces the last user message; `{column}` is filled from the dataset."""
    chat_template_kwargs: TemplateOptions | None = None
    """Variables of the model's chat template, such as `{enable_thinking: false}`. None: the template's own defaults; for
    `evaluation`, those of `data`."""


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


T = TypeVar("T")
Listed = Annotated[tuple[T, ...], BeforeValidator(_to_tuple)]
"""A list in YAML, a tuple in Python."""


def _to_selection(value: Any) -> Any:
    if value == "all":
        return TokenSelection()
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("first", "last"):
        ((keep, k),) = value.items()
        if isinstance(k, int) and not isinstance(k, bool) and k > 0:
            return TokenSelection(keep=keep, k=k)
    if isinstance(value, TokenSelection):
        return value
    raise ValueError("tokens must be `all`, `{first: k}` or `{last: k}` with a positive number of tokens k")


def _from_selection(value: TokenSelection) -> Any:
    return "all" if value.keep == "all" else {value.keep: value.k}


Tokens = Annotated[
    TokenSelection,
    BeforeValidator(_to_selection),
    PlainSerializer(_from_selection),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "all"},
                {
                    "type": "object",
                    "properties": {"first": {"type": "integer"}, "last": {"type": "integer"}},
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
"""`all`, `{first: k}` or `{last: k}`: supervised tokens of each completion, counted in the student's tokens."""


def _check_layers(value: Any) -> Any:
    value = _to_tuple(value)
    if isinstance(value, tuple) and (not value or len(set(value)) < len(value)):
        raise ValueError(f"layers must name each block once and at least one, got {list(value)}")
    return value


Layers = Annotated[
    Literal["all", "last", "even", "odd"] | tuple[PositiveInt, ...],
    BeforeValidator(_check_layers),
]
"""Transformer blocks, counted from 1."""

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Ramp(Section):
    """A number that changes linearly from step 1 to step `steps`, and then stays."""

    start: Annotated[NonNegativeFloat, Field(alias="from")]
    """Its value at step 1."""
    steps: Annotated[int, Field(gt=1, le=2**40)]
    """The step from which it stays."""

    def between(self, to: float, step: int) -> float:
        """The value at a step, counted from 1, on the way to `to`."""
        return self.start + min(1.0, (step - 1) / (self.steps - 1)) * (to - self.start)


class WeightSchedule(Ramp):
    """A weight that changes linearly from `from` at step 1 to `to` at step `steps`, and then stays."""

    to: NonNegativeFloat
    """Its value at step `steps` and after it."""

    @model_validator(mode="after")
    def _some_weight(self) -> "WeightSchedule":
        if not self.start and not self.to:
            raise ValueError("a weight that is 0 from beginning to end: drop the objective")
        return self

    def at(self, step: int) -> float:
        """The weight at a step, counted from 1."""
        return self.between(self.to, step)


def _weight_kind(value: Any) -> str:
    return "schedule" if isinstance(value, dict | WeightSchedule) else "number"


Weight = Annotated[
    Annotated[Rate, Tag("number")] | Annotated[WeightSchedule, Tag("schedule")], Discriminator(_weight_kind)
]
"""A number, or `{from: a, to: b, steps: n}`. An error names only the kind that was meant."""

__all__ = [
    "Field", "Layers", "Listed", "NonNegativeFloat", "NonNegativeInt", "OwnPrompt", "PositiveFloat",
    "PositiveInt", "Ramp", "Rate", "Section", "Seed", "Share", "Tokens", "Weight", "WeightSchedule",
]  # fmt: skip
