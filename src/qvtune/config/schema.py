"""Every setting of a run: its type, its one default and its unit. Nothing else in the project holds a default."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
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
Projection = Literal["q", "k", "v", "o"]


class Section(BaseModel):
    """A frozen group of settings; a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class ModelSection(Section):
    """The frozen base model."""

    name_or_path: str = Field(
        default="demo", description="folder of a Hugging Face model, or `demo` = the embedded SmolLM2-135M"
    )
    quantization: Literal["nf4", "none"] = Field(
        default="nf4", description="storage of the frozen matrices; nf4 = 4 bits"
    )
    double_quant: bool = Field(
        default=True, description="quantize the NF4 block statistics as well (0.37 bit a weight less)"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="compute; auto = bfloat16 on a GPU that has it"
    )
    attention: Literal["auto", "flash_attention_3", "flash_attention_2", "sdpa", "eager"] = Field(
        default="auto", description="auto = the fastest that the device has; the choice is logged with its reason"
    )
    allow_pickle: bool = Field(
        default=False, description="read legacy .bin weights where there are no safetensors, as tensors only"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model folder")


_OF_FACTORS = {"rank", "alpha", "dropout"}  # settings of the adapter that `full` has not


class AdapterSection(Section):
    """The trained part."""

    method: Literal["lora", "rslora", "full"] = Field(
        default="lora",
        description="factors scaled by alpha/rank (lora) or alpha/sqrt(rank) (rslora); full = the matrices themselves",
    )
    projections: tuple[Projection, ...] = Field(
        default=("q", "v"), min_length=1, description="attention projections that are trained"
    )
    rank: Positive = 16
    alpha: PositiveNumber = 32.0
    dropout: Number = Field(default=0.0, ge=0, lt=1)

    @field_validator("projections")
    @classmethod
    def _each_projection_once(cls, projections: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if len(set(projections)) != len(projections):
            raise PydanticCustomError("repeated", "must name each projection once")
        return projections

    @model_validator(mode="after")
    def _no_factors_in_full(self) -> Self:
        if given := sorted(_OF_FACTORS & self.model_fields_set) if self.method == "full" else []:
            reason = "trains the matrices themselves, without factors: {given} must not be set (or choose method: lora)"
            raise PydanticCustomError("no_factors", "with method: full " + reason, {"given": ", ".join(given)})
        return self

    @model_serializer(mode="wrap")
    def _only_what_has_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {key: value for key, value in values.items() if self.method != "full" or key not in _OF_FACTORS}


class OptimizerSection(Section):
    """AdamW; ``lr`` is eta_QK of arXiv 2410.02247, ``lr_multipliers: {v: lambda}`` gives eta_V = lambda * eta_QK."""

    lr: PositiveNumber = 2e-4
    lr_multipliers: dict[str, PositiveNumber] = Field(
        default_factory=dict,
        description="q, k, v, o or a regular expression on parameter names -> factor; first match wins",
    )
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveNumber = 1e-8
    weight_decay: Number = Field(default=0.0, ge=0)
    max_grad_norm: PositiveNumber = Field(default=1.0, description="L2 norm of all gradients together")


class ScheduleSection(Section):
    """Learning rate = initial rate of the group * multiplier(step)."""

    name: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: Ratio = Field(default=0.03, description="part of all steps that the rate rises linearly from 0")
    min_ratio: Ratio = Field(default=0.0, description="multiplier that linear and cosine fall towards")


class DataSection(Section):
    """Rows of text."""

    train: str = Field(
        default="demo", description="JSONL file, or `demo` = questions on the Python standard library, made here"
    )
    eval: str | None = Field(default=None, description="JSONL file, `demo`, or null for no evaluation")
    format: Literal["auto", "chat", "prompt_completion"] = Field(
        default="auto", description="auto = by the keys of the first row"
    )
    max_length: Annotated[Integer, Field(ge=8)] = Field(default=1024, description="tokens a row")
    packing: bool = Field(default=True, description="several documents in one row, each attending only to itself")
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="skip = leave out and count in the log")


class TrainSection(Section):
    """How long, in what portions."""

    max_steps: Positive | None = Field(default=None, description="optimizer steps; give this or epochs")
    epochs: PositiveNumber | None = Field(default=None, description="passes over the data; may be a fraction")
    global_batch_size: Positive = Field(default=8, description="rows an optimizer step, over all ranks")
    micro_batch_size: Positive = Field(default=1, description="rows a forward pass, on one rank")
    seed: NonNegative = 0
    eval_every: NonNegative = Field(
        default=0, description="steps between evaluations; 0 = only before and after training"
    )
    save_every: NonNegative = Field(default=0, description="steps between checkpoints; 0 = only after the last step")
    stop_after_step: Positive | None = Field(
        default=None, description="save and leave with exit code 75 after this step"
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute activations in backward: less memory, half as much work again"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.max_steps is None) == (self.epochs is None):
            raise PydanticCustomError("one_length", "must have exactly one of max_steps and epochs")
        return self


class CheckpointSection(Section):
    """What is kept, and how a run begins."""

    keep: Positive = Field(default=3, description="newest checkpoints that are kept")
    resume: Literal["never", "if_available", "always"] = Field(
        default="if_available", description="never = start anew (an earlier run in run_dir is moved aside, not deleted)"
    )


class RunConfig(Section):
    """A complete run."""

    task: Literal["causal_lm"] = "causal_lm"
    run_dir: str
    deepspeed: str = Field(
        default="zero3.json", description="DeepSpeed JSON: a path, or the name of a file in ds_configs/"
    )
    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    data: DataSection = DataSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
