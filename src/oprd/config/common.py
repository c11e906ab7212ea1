"""What the classes of a recipe have in common."""

from typing import Annotated, Literal

from pydantic import Field

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
DType = Literal["float32", "bfloat16", "float16"]
PYDANTIC = {"extra": "forbid", "strict": True}
