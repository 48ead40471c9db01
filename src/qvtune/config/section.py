"""What all sections of settings are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _not_true_or_false(value: Any) -> Any:
    """Refuses ``max_steps: yes``, which pydantic would read as 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("bool_as_number", "must be a number (YAML reads yes, no, on, off as true or false)")
    return value


Integer = Annotated[int, BeforeValidator(_not_true_or_false)]
Number = Annotated[float, BeforeValidator(_not_true_or_false), Field(allow_inf_nan=False)]
Positive = Annotated[Integer, Field(gt=0)]
NonNegative = Annotated[Integer, Field(ge=0)]
PositiveNumber = Annotated[Number, Field(gt=0)]
Ratio = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]


class Section(BaseModel):
    """An immutable group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
