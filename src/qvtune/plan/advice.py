"""Which stage, micro-batch and checkpointing are the fastest that fit."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qvtune.config.deepspeed import resolve_deepspeed
from qvtune.config.schema import RunConfig
from qvtune.config.zero_stage import StageFile, choose_stage
from qvtune.model.adapters import is_of_head
from qvtune.model.families import FAMILIES, ends_in, trained_matrices
from qvtune.plan.memory import Costs, costs_of
from qvtune.plan.simulate import BASE, GATHERED, HEAD, LAYER, SAVED, Setup, model_of
from qvtune.plan.step_time import Cluster, step_time

_PER_TOKEN = (SAVED, HEAD, LAYER)  # causes that grow with the tokens of a micro-batch
_FASTER = 0.97  # of the time of a choice that needs less memory, or it is not worth it
_MAX_MICRO_BATCH = 64


@dataclass(frozen=True)
class Advice:
    """A configuration that fits, with its estimates; ``reason`` is the arithmetic of its stage."""

    stage: StageFile
    micro_batch_size: int
    checkpointing: bool
    seconds: float
    reason: str

    def overrides(self, run: RunConfig) -> list[str]:
        """What has to be changed in ``run`` to get it."""
        wanted: dict[str, tuple[Any, Any]] = {
            "deepspeed": (run.deepspeed, self.stage),
            "train.micro_batch_size": (run.train.micro_batch_size, self.micro_batch_size),
            "train.activation_checkpointing": (run.train.activation_checkpointing, self.checkpointing),
        }
        return [f"{key}={str(value).lower()}" for key, (now, value) in wanted.items() if now != value]


def whole_base_bytes(setup: Setup) -> int:
    """Bytes of the frozen base, as it is stored."""
    trained = trained_matrices(setup.run.adapter, FAMILIES[setup.model_config.model_type])
    _, skeleton = model_of(setup)
    parameters = skeleton.named_parameters()
    frozen = (
        one for name, one in parameters if not is_of_head(name) and not ends_in(name.removesuffix(".weight"), trained)
    )
    return int(sum(parameter.numel() for parameter in frozen)) * setup.dtype.itemsize


def advise(setup: Setup, costs_as_configured: Costs, cluster: Cluster) -> Advice | None:
    """The fastest configuration that fits; of equally fast ones that with the least memory. None if none fits."""
    base = whole_base_bytes(setup)
    best: Advice | None = None
    sharded = _variant(setup, "zero3.json", cluster, checkpointing=True)
    is_known = setup.run.deepspeed == "zero3.json" and setup.run.train == sharded.run.train.model_copy(
        update={"global_batch_size": setup.run.train.global_batch_size}
    )
    gathering = costs_as_configured if is_known else costs_of(sharded, cluster.num_gpus)
    gathered = max(peak[GATHERED] for peak in gathering.peaks.values())
    for checkpointing in (True, False):
        costs = costs_of(_variant(setup, "zero2.json", cluster, checkpointing=checkpointing), cluster.num_gpus)
        for micro_batch in _micro_batches(setup.run, cluster):
            other = max(
                sum(size * (micro_batch if cause in _PER_TOKEN else 1) for cause, size in peak.items() if cause != BASE)
                for peak in costs.peaks.values()
            )
            choice = choose_stage(base, gathered, other, cluster.gpu.memory, cluster.gpus_per_node, cluster.nodes)
            if not choice.fits:
                break
            seconds = _seconds(costs, gathering, choice.file, micro_batch, setup.run, cluster)
            if best is None or seconds < _FASTER * best.seconds:
                best = Advice(choice.file, micro_batch, checkpointing, seconds, choice.reason)
    return best


def _variant(setup: Setup, stage: StageFile, cluster: Cluster, *, checkpointing: bool) -> Setup:
    """One row a micro-batch under another stage."""
    train = setup.run.train.model_copy(
        update={
            "activation_checkpointing": checkpointing,
            "micro_batch_size": 1,
            "global_batch_size": cluster.num_gpus,
        }
    )
    run = setup.run.model_copy(update={"deepspeed": stage, "train": train})
    name = str(setup.dtype).removeprefix("torch.")
    return replace(setup, run=run, deepspeed_config=resolve_deepspeed(run, cluster.num_gpus, name))


def _micro_batches(run: RunConfig, cluster: Cluster) -> Iterator[int]:
    """Rows per forward pass that divide the rows of a rank."""
    rows = run.train.global_batch_size // cluster.num_gpus
    return (size for size in range(1, min(rows, _MAX_MICRO_BATCH) + 1) if rows % size == 0)


def _seconds(
    costs: Costs, gathering: Costs, stage: StageFile, micro_batch: int, run: RunConfig, cluster: Cluster
) -> float:
    """Expected for a step: operations of all rows, gathers of all micro-batches."""
    rows = run.train.global_batch_size // cluster.num_gpus
    gathered = 0 if stage == "zero2.json" else gathering.gathered
    in_node = stage == "zero3_hpz.json"
    of_stage = replace(
        costs,
        operations=Counter({key: count * micro_batch for key, count in costs.operations.items()}),
        gathered=0 if in_node else gathered,
        gathered_in_node=gathered if in_node else 0,
    )
    return step_time(of_stage, cluster, rows // micro_batch, sharded=stage != "zero2.json").expected
