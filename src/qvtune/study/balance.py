"""The balance point: the lambda at which the first updates of W_q and W_k and those of W_v change the output equally.

A hypothesis about the best lambda that costs a few steps: Theorem 2 of arXiv 2410.02247 calls learning efficient where
both sides contribute equally to a step's change of the output. Here that is measured on the real model and data. A
search reports whether it found its best lambda there.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qvtune.config.schema import OptimizerSection, RunConfig
from qvtune.data.batch import Batch
from qvtune.distributed import process_group
from qvtune.errors import UserError, naming_setting
from qvtune.model.adapters import add_adapters, group_and_factor, trainable
from qvtune.model.attention import prepare_attention
from qvtune.model.loader import fill, open_base
from qvtune.model.shard import Whole
from qvtune.train.preflight import preflight

_STEPS, _ROWS = 4, 8  # steps that are trained, and rows on which the change is measured
_QK = ("q", "k")
Values = dict[str, torch.Tensor]


def measure_balance(run: RunConfig) -> float:
    """The balance point of a recipe, in this process. Raises UserError for what ``preflight`` refuses."""
    plan = preflight(run, 1)
    head = plan.task.head(run.train.seed, plan.rows)
    prepare_attention(plan.attention, deterministic=run.model.deterministic_attention)
    with naming_setting("model.name_or_path"):
        base = open_base(plan.folder, run.model, plan.dtype, plan.attention, run.adapter, head)
    fill(base, Whole(process_group.device()), plan.dtype)
    names = str(plan.folder), run.train.seed, plan.task.peft_task_type, base.new_modules
    objective = plan.task.objective(add_adapters(base.model, run.adapter, *names)).to(process_group.device())

    def batches(step: int, size: int) -> list[Batch]:
        rows = [plan.rows[int(row)] for row in plan.order.of_step(step, size)]
        parts = [rows[start : start + _ROWS] for start in range(0, size, _ROWS)]
        return [plan.task.collate(part, plan.pad_token_id).to(process_group.device()) for part in parts]

    steps = [batches(step, run.train.global_batch_size) for step in range(_STEPS)]
    (probe,) = batches(0, _ROWS)
    return balance_point(objective, steps, probe, run.optimizer)


def balance_point(
    objective: nn.Module, steps: Sequence[Sequence[Batch]], probe: Batch, optimizer: OptimizerSection
) -> float:
    """lambda at which both kinds of updates change the attention's output on ``probe`` equally.

    ``objective``: Batch -> summed loss, its adapters as training starts with them, to which they are set back. Factors
    of q, k and v are trained for ``steps``, each of several micro-batches, all at eta_QK. Then the change of each
    attention module's output is measured for q and k alone and for v alone; lambda is the ratio of the two norms, the
    geometric mean over layers. It holds as far as the change is proportional to the rate.
    """
    parameters = {name: one for name, one in trainable(objective) if group_and_factor(name)[0] in (*_QK, "v")}
    before = {name: one.detach().clone() for name, one in parameters.items()}
    objective.eval()
    trained = _trained(objective, parameters, steps, optimizer)
    outputs = {}
    for side in ("none", "qk", "v"):
        chosen = {name: value for name, value in trained.items() if _side(name) == side}
        _set(parameters, {**before, **chosen})
        outputs[side] = _attention_outputs(objective, list(parameters), probe)
    _set(parameters, before)
    changes = {
        side: [(one - old).norm().item() for one, old in zip(outputs[side], outputs["none"], strict=True)]
        for side in ("qk", "v")
    }
    ratios = [math.log(qk / v) for qk, v in zip(changes["qk"], changes["v"], strict=True) if qk and v]
    if not ratios:
        raise UserError("the first steps change no attention output: optimizer.lr is too small for the compute dtype")
    return math.exp(sum(ratios) / len(ratios))


def _side(name: str) -> str:
    return "qk" if group_and_factor(name)[0] in _QK else "v"


def _trained(
    objective: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    steps: Sequence[Sequence[Batch]],
    optimizer: OptimizerSection,
) -> Values:
    """Values after the steps of AdamW, all at the rate eta_QK."""
    adam = torch.optim.AdamW(
        list(parameters.values()), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=0.0
    )
    for batches in steps:
        labels = sum(batch.num_label_tokens for batch in batches)
        for batch in batches:
            (objective(batch) / labels).backward()
        adam.step()
        objective.zero_grad(set_to_none=True)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def _set(parameters: Mapping[str, nn.Parameter], values: Values) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@torch.no_grad()
def _attention_outputs(objective: nn.Module, names: Sequence[str], probe: Batch) -> list[torch.Tensor]:
    """Of each attention module that has adapters, in the model's order, fp32."""
    found: list[torch.Tensor] = []
    with _recording(objective, names, found):
        objective(probe)
    return found


@contextmanager
def _recording(objective: nn.Module, names: Sequence[str], found: list[torch.Tensor]) -> Iterator[None]:
    def record(_: nn.Module, __: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).float().clone())

    paths = dict.fromkeys(_attention_path(name) for name in names)
    hooks = [objective.get_submodule(path).register_forward_hook(record) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _attention_path(name: str) -> str:
    """``...layers.0.self_attn.q_proj.lora_A.default.weight`` -> ``...layers.0.self_attn``."""
    projection = name.partition(".lora_")[0].partition(".ia3_l")[0].removesuffix(".weight").removesuffix(".bias")
    return projection.rpartition(".")[0]
