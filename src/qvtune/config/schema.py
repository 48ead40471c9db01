"""Every setting of a run with its type, unit and default: here, and in ``config/data.py`` those of the data.

No other module defines a default of a setting.
"""

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from qvtune.config.adapter import AdapterSection as AdapterSection
from qvtune.config.data import DataSection as DataSection
from qvtune.config.generate import GenerateSection
from qvtune.config.report import ReportSection
from qvtune.config.section import Beta, NonNegative, Number, Positive, PositiveNumber, Ratio, Section


class ModelSection(Section):
    """The frozen base model: where it is, how it is stored, which kernels compute with it."""

    name_or_path: str = Field(
        default="demo", description="folder of a Hugging Face model, hub id, or `demo` = the embedded SmolLM2-135M"
    )
    revision: str | None = Field(
        default=None, description="commit, tag or branch of a hub id; none = the newest version on the hub"
    )
    quantization: Literal["nf4", "none"] = Field(
        default="nf4", description="storage of the frozen matrices; nf4 = 4 bits per weight; none = dtype"
    )
    double_quant: bool = Field(
        default=True, description="quantize the NF4 block statistics, too: 0.37 bit per weight less"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="compute dtype; auto = bfloat16 on a GPU that supports it, else float32"
    )
    attention: Literal["auto", "flash_attention_3", "flash_attention_2", "varlen", "sdpa", "eager"] = Field(
        default="auto",
        description="attention kernels; varlen = torch's own flash kernel, on a CPU one document after another; auto = "
        "the first of this list that runs here; the reason is logged",
    )
    deterministic_attention: bool = Field(
        default=True,
        description="on a GPU the backward of the flash kernels (flash_attention_3, flash_attention_2, varlen) gives "
        "the same bits every time, as exact resume needs; false: a faster backward with less memory",
    )
    allow_pickle: bool = Field(
        default=False,
        description="read legacy .bin weights if there are no safetensors; they are opened as tensors only",
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that the model folder contains")


class OptimizerSection(Section):
    """AdamW; ``lr`` is eta_QK of arXiv 2410.02247, ``lr_multipliers: {v: lambda}`` gives eta_V = lambda * eta_QK."""

    lr: PositiveNumber = Field(default=2e-4, description="peak learning rate of groups without a multiplier (eta_QK)")
    lr_multipliers: dict[str, PositiveNumber] = Field(
        default_factory=dict,
        description="a projection, head, A, B, magnitude, bias, one of these of a projection as in v.B, or a regular "
        "expression on parameter names -> factor on lr; the first match wins, so write v.B before B or v",
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="AdamW: decay of the two moments per step")
    eps: PositiveNumber = Field(default=1e-8, description="AdamW: added to the denominator")
    weight_decay: Number = Field(
        default=0.0, ge=0, description="AdamW: parameters but biases shrink by this times the rate per step"
    )
    head_weight_decay: Number = Field(
        default=0.0, ge=0, description="the same for the matrices of a classification head; its biases have none"
    )
    as_in_paper: bool = Field(
        default=False,
        description="group a classification head as the authors of arXiv 2410.02247 do: its matrices with q and k, its "
        "biases with v; lr_multipliers may then have v alone",
    )
    max_grad_norm: PositiveNumber = Field(
        default=1.0, description="gradients are clipped to this L2 norm over all trained parameters"
    )

    @model_validator(mode="after")
    def _only_v_in_the_paper(self) -> Self:
        if self.as_in_paper and (others := [key for key in self.lr_multipliers if key != "v"]):
            reason = "with as_in_paper: true must have no other lr_multipliers than v, but has {others}"
            raise PydanticCustomError("as_in_paper", reason, {"others": ", ".join(others)})
        return self


class ScheduleSection(Section):
    """Learning rate of a group = its initial rate * multiplier(step)."""

    name: Literal["constant", "linear", "cosine"] = Field(default="linear", description="multiplier after the warm-up")
    warmup_ratio: Ratio = Field(
        default=0.03, description="fraction of all steps in which the rate rises linearly from 0"
    )
    min_ratio: Ratio = Field(default=0.0, description="multiplier that linear and cosine fall towards")


class TrainSection(Section):
    """Length of the run and batch sizes."""

    max_steps: Positive | None = Field(default=None, description="number of optimizer steps; set this or epochs")
    epochs: PositiveNumber | None = Field(
        default=None, description="passes over the data, may be a fraction; set this or max_steps"
    )
    global_batch_size: Positive = Field(default=8, description="rows per optimizer step, over all ranks")
    micro_batch_size: Positive = Field(default=1, description="rows per forward pass on one rank")
    seed: NonNegative = Field(default=0, description="of the order of rows, of new parameters and of dropout")
    eval_every: NonNegative = Field(
        default=0, description="optimizer steps between evaluations; 0 = only before and after training"
    )
    eval_at_start: bool = Field(default=True, description="evaluate before the first step, too")
    eval_rows: bool = Field(
        default=False,
        description="add to run_dir/eval_rows.jsonl, at each evaluation, the loss of each document of data.eval in "
        "nats, and its prediction where there is one",
    )
    save_every: NonNegative = Field(
        default=0, description="optimizer steps between checkpoints; 0 = only after the last step"
    )
    stop_after_step: Positive | None = Field(default=None, description="save after this step and exit with code 75")
    max_hours: PositiveNumber | None = Field(
        default=None, description="save after so many hours since the start, whatever the step, and exit with code 75"
    )
    hang_seconds: PositiveNumber | None = Field(
        default=600.0,
        description="end all ranks with code 76 when one has given no sign of life for so many seconds; must exceed "
        "the slowest micro-batch and the slowest save; at most 0.9 * QVTUNE_TIMEOUT_SECONDS counts; null = never",
    )
    early_stopping: Positive | None = Field(
        default=None,
        description="end the run after so many evaluations in a row without a better value of the metric that decides "
        "which checkpoint is the best; null = never",
    )
    best_metric: Literal["auto", "loss", "token_accuracy", "exact_match"] = Field(
        default="auto",
        description="decides which checkpoint is the best; auto = loss, with sequence_classification "
        "classification.metric; exact_match = of the answers to train.generate.rows",
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute activations in backward: less memory, about 50 % more computation"
    )
    generate: GenerateSection | None = Field(default=None, description="answers while training; null = none")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.max_steps is None) == (self.epochs is None):
            raise PydanticCustomError("one_length", "must have exactly one of max_steps and epochs")
        return self

    @model_validator(mode="after")
    def _exact_match_needs_expected_answers(self) -> Self:
        if self.best_metric == "exact_match" and (self.generate is None or self.generate.rows is None):
            raise PydanticCustomError("no_answers", "with best_metric: exact_match must have generate.rows")
        return self


class CheckpointSection(Section):
    """Which checkpoints are kept, and how a run starts."""

    keep: Positive = Field(default=3, description="number of newest checkpoints that are kept, besides `best`")
    resume: Literal["never", "if_available", "always"] = Field(
        default="if_available",
        description="never = start from scratch (an earlier run in run_dir is renamed, not deleted); "
        "if_available = resume from the newest checkpoint that is not damaged, if there is one; always = fail if there "
        "is none or the newest is damaged",
    )
    max_failed_saves: Positive = Field(
        default=3,
        description="stop with exit code 75 when so many checkpoints in a row could not be written (no space, a file "
        "system that is away)",
    )


CLASS_METRICS, SCORE_METRICS = ("accuracy", "f1", "matthews"), ("pearson", "spearman")


class ClassificationSection(Section):
    """Task `sequence_classification`: what is predicted of a text, or of a pair of texts."""

    labels: tuple[str, ...] | None = Field(
        default=None,
        min_length=2,
        description="names of the classes, in the order of the model's outputs; null = those of the training rows, "
        "sorted",
    )
    problem: Literal["single_label", "regression"] = Field(
        default="single_label", description="single_label = one of several classes; regression = a number"
    )
    metric: Literal["auto", "loss", "accuracy", "f1", "matthews", "pearson", "spearman"] = Field(
        default="auto",
        description="decides which checkpoint is the best; auto = accuracy, with regression pearson; f1 = of the "
        "second of two classes, or the mean over more",
    )

    @model_validator(mode="after")
    def _fits_the_problem(self) -> Self:
        if self.labels is not None and self.problem == "regression":
            raise PydanticCustomError(
                "no_labels", "must not have labels with problem: regression, which has no classes"
            )
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise PydanticCustomError("repeated", "must name each label once")
        allowed = ("auto", "loss", *(SCORE_METRICS if self.problem == "regression" else CLASS_METRICS))
        if self.metric not in allowed:
            reason = "must have with problem: {problem} one of the metrics {allowed}"
            raise PydanticCustomError("metric", reason, {"problem": self.problem, "allowed": ", ".join(allowed)})
        return self


class RunConfig(Section):
    """A complete run: its task, its folder and its DeepSpeed configuration; everything else is in sections."""

    task: Literal["causal_lm", "sequence_classification"] = Field(
        default="causal_lm",
        description="what is trained: causal_lm = next-token prediction; sequence_classification = a class or a number "
        "for a text or a pair of texts",
    )
    run_dir: str = Field(description="folder of the run: record, checkpoints, logs")
    deepspeed: str = Field(
        default="auto",
        description="DeepSpeed JSON: a path, or the name of a file in ds_configs/; auto = on GPUs the first that fits "
        "of zero2.json, zero3_hpz.json (several nodes) and zero3.json, on CPUs zero3.json; the reason is logged",
    )
    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    data: DataSection = DataSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    report: ReportSection = ReportSection()
    classification: ClassificationSection = ClassificationSection()

    @model_validator(mode="after")
    def _early_stopping_needs_evaluations(self) -> Self:
        if self.train.early_stopping is not None and (self.data.eval is None or not self.train.eval_every):
            raise PydanticCustomError("no_evaluations", "train.early_stopping needs data.eval and train.eval_every > 0")
        return self

    @model_validator(mode="after")
    def _rows_to_evaluate(self) -> Self:
        if self.train.eval_rows and self.data.eval is None:
            raise PydanticCustomError("no_eval", "train.eval_rows needs data.eval, which is not set")
        return self

    @model_validator(mode="after")
    def _rows_to_answer(self) -> Self:
        if self.train.generate is not None and self.train.generate.rows and self.data.eval is None:
            raise PydanticCustomError("no_rows", "train.generate.rows are rows of data.eval, which is not set")
        return self

    @model_validator(mode="after")
    def _only_language_models_generate(self) -> Self:
        given = {"generate": self.train.generate is not None, "best_metric": self.train.best_metric != "auto"}
        if self.task != "causal_lm" and (names := [name for name, is_set in given.items() if is_set]):
            reason = (
                "task: {task} generates no text and has its own classification.metric: train.{names} must not be set"
            )
            raise PydanticCustomError("no_text", reason, {"task": self.task, "names": ", train.".join(names)})
        return self

    @model_validator(mode="after")
    def _head_of_its_task(self) -> Self:
        given = {"as_in_paper": self.optimizer.as_in_paper, "head_weight_decay": self.optimizer.head_weight_decay}
        if self.task == "causal_lm" and (names := [name for name, value in given.items() if value]):
            reason = "with task: causal_lm there is no classification head: optimizer.{names} must not be set"
            raise PydanticCustomError("no_head", reason, {"names": ", optimizer.".join(names)})
        return self

    @model_validator(mode="after")
    def _classification_of_its_task(self) -> Self:
        if given := sorted(self.classification.model_fields_set) if self.task == "causal_lm" else []:
            reason = (
                "with task: causal_lm classification.{given} must not be set (or set task: sequence_classification)"
            )
            raise PydanticCustomError("other_task", reason, {"given": ", classification.".join(given)})
        return self

    @model_serializer(mode="wrap")
    def _only_what_has_effect(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {key: value for key, value in values.items() if self.task != "causal_lm" or key != "classification"}
