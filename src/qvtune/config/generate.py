"""The settings of answers that are generated while training."""

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from qvtune.config.section import Positive, Section


def _regular_expression(pattern: str) -> str:
    try:
        num_groups = re.compile(pattern).groups
    except re.error as error:
        raise PydanticCustomError(
            "regular_expression", "must be a regular expression ({reason})", {"reason": str(error)}
        ) from error
    if num_groups != 1:
        raise PydanticCustomError("one_group", "must have one group, in parentheses: the final answer")
    return pattern


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Prompts = Annotated[
    tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1), WithJsonSchema({"type": "text, or list of texts"})
]


class GenerateSection(Section):
    """Answers of the model while it is trained. Prompts are one of `prompts`, `file` and `rows`."""

    prompts: _Prompts | None = Field(
        default=None,
        description="each is a user's message where the training rows are conversations, else the text as it is",
    )
    file: str | None = Field(default=None, description="text file with one such prompt per line")
    rows: Positive | None = Field(
        default=None,
        description="the first so many rows of (the first set of) data.eval, each up to its last answer, which is the "
        "expected one",
    )
    every: Positive | None = Field(
        default=None,
        description="optimizer steps between generations, besides before and after training; null = with each "
        "evaluation",
    )
    max_new_tokens: Positive = Field(default=128, description="tokens of an answer at most")
    batch_size: Positive = Field(default=8, description="prompts that a rank answers at a time")
    final_answer: Annotated[str, AfterValidator(_regular_expression)] = Field(
        default=r"####\s*(.+)",
        description="regular expression; the group of its last match is what exact_match compares, or the whole answer "
        "where the expected one has no match",
    )

    @model_validator(mode="after")
    def _one_kind_of_prompts(self) -> Self:
        if sum(given is not None for given in (self.prompts, self.file, self.rows)) != 1:
            raise PydanticCustomError("prompts", "must have exactly one of prompts, file and rows")
        return self
