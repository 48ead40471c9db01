"""The settings of what is trained: section ``adapter``."""

import math
from typing import Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qvtune.config.section import Number, Positive, PositiveNumber, Section

Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
_OF_FACTORS = {"rank", "alpha", "dropout", "init"}  # settings of low-rank factors, which not every method has
_NO_METHODS = {  # others that people ask for -> why not
    "adalora": "PEFT changes its factors in place after each step, where ZeRO keeps them in pieces with float32 "
    "masters that would not follow, and adds a penalty to the loss of its own forward; choose lora or dora",
    "qlora": "that is method: lora with model.quantization: nf4",
    "lora+": "that is method: lora with a rate for B, as in optimizer.lr_multipliers.B=16",
}
_CHANGES_BASE = "it takes out of the base's matrices what the factors start with, so the adapter fits no other base; "
_ALLOWED = "choose default, gaussian or orthogonal"
_NO_INITS = {
    "pissa": _CHANGES_BASE + _ALLOWED,
    "olora": _CHANGES_BASE + _ALLOWED,
    "eva": "it needs the data's activations at every projection before ZeRO's engine exists, which alone can run a "
    f"sharded base; {_ALLOWED}",
}


def lora_scale(alpha: float, rank: int, *, is_rslora: bool) -> float:
    """What B A is multiplied with: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if is_rslora else rank)


class AdapterSection(Section):
    """Which parameters are trained."""

    method: Literal["lora", "rslora", "dora", "ia3", "full", "bias"] = Field(
        default="lora",
        description="lora = factors scaled by alpha/rank; rslora = by alpha/sqrt(rank); dora = as lora, and a trained "
        "norm for each output; ia3 = a factor for each output, of down for each input; full = the matrices "
        "themselves; bias = the biases alone",
    )
    projections: tuple[Projection, ...] = Field(
        default=("q", "v"),
        min_length=1,
        description="matrices that are trained: of the attention q, k, v, o; of a decoder's MLP gate, up, down",
    )
    rank: Positive = Field(
        default=16, description="inner dimension of the factors A and B; only with lora, rslora and dora"
    )
    alpha: PositiveNumber = Field(default=32.0, description="numerator of the scale; only with lora, rslora and dora")
    dropout: Number = Field(
        default=0.0, ge=0, lt=1, description="probability that an input of A is zeroed; only with lora, rslora and dora"
    )
    init: Literal["default", "gaussian", "orthogonal"] = Field(
        default="default",
        description="first values of A, where B is 0: default = uniform, as nn.Linear; gaussian = normal, deviation "
        "1/rank; orthogonal = A and B whose product is 0 (even rank); only with lora, rslora and dora",
    )
    biases: bool = Field(default=False, description="with method: full, train the biases of these matrices, too")

    @property
    def has_factors(self) -> bool:
        """Whether A and B are trained."""
        return self.method in ("lora", "rslora", "dora")

    @property
    def trains_biases(self) -> bool:
        """Whether biases of the base are trained."""
        return self.biases or self.method == "bias"

    @field_validator("method", "init", mode="before")
    @classmethod
    def _with_the_reason(cls, value: Any, setting: ValidationInfo) -> Any:
        refused = _NO_METHODS if setting.field_name == "method" else _NO_INITS
        if isinstance(value, str) and (reason := refused.get(value.lower())):
            raise PydanticCustomError("refused", "is not supported: " + reason)
        return value

    @field_validator("projections")
    @classmethod
    def _each_projection_once(cls, projections: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if len(set(projections)) != len(projections):
            raise PydanticCustomError("repeated", "must name each projection once")
        return projections

    @model_validator(mode="after")
    def _only_what_the_method_has(self) -> Self:
        if given := sorted(_OF_FACTORS & self.model_fields_set) if not self.has_factors else []:
            reason = "with method: {method} trains no low-rank factors: {given} must not be set "
            values = {"method": self.method, "given": ", ".join(given)}
            raise PydanticCustomError("no_factors", reason + "(or choose method: lora)", values)
        if self.init == "orthogonal" and self.rank % 2:
            raise PydanticCustomError("odd_rank", "with init: orthogonal must have an even rank")
        if self.biases and self.method != "full":
            reason = "with method: {method} must not have biases: true (method: bias trains biases alone, full both)"
            raise PydanticCustomError("no_biases", reason, {"method": self.method})
        return self

    @model_serializer(mode="wrap")
    def _only_what_has_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {key: value for key, value in values.items() if self.has_factors or key not in _OF_FACTORS}
