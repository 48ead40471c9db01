"""``deepspeed: auto``: which configuration of ds_configs/ a run gets, from the sizes of its model and of its GPUs."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qvtune.config.deepspeed import AUTO, resolve_deepspeed
from qvtune.config.schema import RunConfig
from qvtune.config.zero_stage import GIB
from qvtune.distributed import process_group
from qvtune.errors import UserError
from qvtune.train.checks import Checks
from qvtune.train.step_memory import Gpus, StepMemory

SHARDED = "zero3.json"  # where nothing is known


@dataclass(frozen=True)
class Ranks:
    """Where a run computes, as ``preflight`` is told."""

    number: int
    on_gpus: bool | None
    per_node: int | None = None

    @property
    def are_here(self) -> bool:
        """Whether they are the ranks of this process group."""
        return self.on_gpus is None and self.number == process_group.world_size()


def resolve_or_choose(
    config: RunConfig, dtype: torch.dtype, memory: StepMemory | None, ranks: Ranks, checks: Checks
) -> tuple[dict[str, Any] | None, str]:
    """DeepSpeed's configuration, None if it has problems, and for the log a line on what ``deepspeed: auto`` means."""
    reason = ""
    if config.deepspeed == AUTO:
        gpus = gpus_here() if ranks.are_here else None
        elsewhere = not ranks.are_here and ranks.on_gpus is not False
        choose = partial(choose_deepspeed, memory, gpus, elsewhere=elsewhere)
        file, reason = process_group.on_main(choose)  # one choice, also where hosts see different models
        config, reason = config.model_copy(update={"deepspeed": file}), f"\n{reason}"
    per_node = ranks.per_node or (process_group.ranks_of_host() if ranks.are_here else None)
    name = str(dtype).removeprefix("torch.")
    resolved = checks.run(lambda: resolve_deepspeed(config, ranks.number, name, per_node))
    checks.run(lambda: _check_nan_check(config, resolved))
    return resolved, reason


def _check_nan_check(config: RunConfig, deepspeed_config: dict[str, Any] | None) -> None:
    """Gathers of a quantized base must not be searched for NaN: its codes are stored in the dtype of the compute."""
    gathered = deepspeed_config is None or deepspeed_config["zero_optimization"]["stage"] == 3
    if config.model.quantization == "nf4" and gathered and (value := process_group.nan_check()) is not None:
        raise UserError(
            f"the environment variable TORCH_NCCL_NAN_CHECK is {value!r}: torch would end the run when it gathers the "
            "base, since some packed 4-bit codes are NaN when read as numbers; unset it in the shell that starts the "
            "run or in slurm/cluster.env (it is allowed with `model.quantization: none` and with zero2.json)"
        )


def choose_deepspeed(memory: StepMemory | None, gpus: Gpus | None, *, elsewhere: bool) -> tuple[str, str]:
    """The file that ``deepspeed: auto`` means, and why, in one line for the log.

    ``gpus`` None: the ranks compute on CPUs or, ``elsewhere``, on GPUs that are not known. ``memory`` None: the model
    could not be looked at.
    """
    if gpus is not None and memory is not None:
        file, reason = memory.choose(gpus)
        return file, f"deepspeed: auto: {reason} ({gpus.nodes} x {gpus.per_node} GPUs of {gpus.memory / GIB:.1f} GiB)"
    if elsewhere:
        return SHARDED, "deepspeed: auto: chosen when the run starts; launch/plan.py shows what for GPUs that it knows"
    return SHARDED, f"deepspeed: auto: {SHARDED}, as always on CPUs"


def gpus_here() -> Gpus | None:
    """Those of all ranks, the same on all of them; None if they compute on CPUs. Collective."""
    device = process_group.device()
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    found = process_group.all_gather_object((memory, process_group.ranks_of_host()))
    smallest, ranks = min(memory for memory, _ in found), {ranks for _, ranks in found}
    if smallest == 0:
        return None
    per_node = max(ranks) if len(ranks) == 1 and len(found) % max(ranks) == 0 else 1
    return Gpus(smallest, per_node, len(found) // per_node)
