"""Which part of a flattened tensor a rank keeps, and how a part becomes a ZeRO-3 parameter."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from qvtune.distributed import process_group
from qvtune.model.gather import use_short_gather


@dataclass(frozen=True)
class Shard:
    """One rank's place among ``num_ranks``; ``Shard(0, 1)`` keeps everything."""

    rank: int = 0
    num_ranks: int = 1

    def numel(self, total: int) -> int:
        """Elements a rank stores of ``total``, the padding of the last ranks included (ZeRO-3's rule)."""
        return -(-total // self.num_ranks)

    def span(self, total: int) -> tuple[int, int]:
        """``[start, end)`` of the elements of ``total`` that this rank stores, without padding."""
        size = self.numel(total)
        return min(self.rank * size, total), min((self.rank + 1) * size, total)

    def peers(self) -> list["Shard"]:
        """All ranks, in order."""
        return [Shard(rank, self.num_ranks) for rank in range(self.num_ranks)]


class Placement(Protocol):
    """Where the loader puts what it has read: sharded over the ranks, or whole on this one."""

    @property
    def shard(self) -> Shard: ...

    @property
    def device(self) -> torch.device: ...

    def parameter(self, shape: tuple[int, ...], piece: torch.Tensor) -> nn.Parameter:
        """A frozen parameter of ``shape`` of which this rank holds ``piece`` (1-D, ``shard.numel`` elements)."""
        ...

    def all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks that hold a part, in rank order; equal shapes, in host memory. Collective."""
        ...


@dataclass(frozen=True)
class Whole:
    """Every parameter whole on one device: ZeRO-2, a single process, the merge's proof."""

    device: torch.device
    shard: Shard = Shard()

    def parameter(self, shape: tuple[int, ...], piece: torch.Tensor) -> nn.Parameter:
        """``piece`` itself, in its shape."""
        return nn.Parameter(piece.to(self.device).view(shape), requires_grad=False)

    def all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        """``own`` alone: no other rank holds a part."""
        return [own]


class ZeroPartition:
    """ZeRO-3 parameters that were never whole: DeepSpeed's bookkeeping around this rank's piece.

    DeepSpeed's own way (``zero.Init``) makes the whole tensor on every rank, broadcasts it from rank 0 and cuts it.
    Here the parameter is registered with its shape alone and its ``ds_tensor`` is what the rank has read for itself.
    """

    def __init__(self, deepspeed_config: dict[str, Any], dtype: torch.dtype) -> None:
        import deepspeed

        self.shard = Shard(process_group.rank(), process_group.world_size())
        # zero.Init asks only for what concerns parameters; the batch sizes are settled by deepspeed.initialize.
        self._init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config, dtype=dtype)
        self.device = torch.device(self._init.local_device)

    def parameter(self, shape: tuple[int, ...], piece: torch.Tensor) -> nn.Parameter:
        """A parameter in ZeRO-3's state "not available", which DeepSpeed gathers before its module runs."""
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param

        # A stride of 0 gives the shape without the memory.
        parameter: Any = nn.Parameter(
            torch.empty(1, dtype=piece.dtype, device=self.device).expand(shape), requires_grad=False
        )
        self._init._convert_to_deepspeed_param(parameter)
        assert piece.numel() == self.shard.numel(parameter.ds_numel), (piece.shape, shape, self.shard)
        stored: Any = piece.to(self._init.remote_device)
        if self._init.pin_memory:
            stored = get_accelerator().pin_memory(stored)  # as it is where the accelerator is a CPU
        stored.ds_numel = stored.numel()
        stored.status = PartitionedParamStatus.AVAILABLE
        stored.final_location = None
        parameter.ds_tensor = stored
        parameter.ds_numel_aligned = stored.numel() * self.shard.num_ranks
        free_param(parameter)
        if not (self._init.allgather_sequential or self._init.use_all_reduce_for_fetch_params):  # other collectives
            use_short_gather(parameter)
        return cast(nn.Parameter, parameter)

    def all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        """As ``Placement``."""
        return [part.cpu() for part in process_group.all_gather_tensor(own.to(self.device))]


def release_gathered(engine: Any) -> None:
    """Release what ZeRO-3 is gathering for the next step, as after an evaluation. Nothing with ZeRO-2. Collective.

    DeepSpeedEngine's ``empty_partition_cache`` collects Python's garbage as well, which takes longer than a save.
    """
    if hasattr(engine.optimizer, "empty_partition_cache"):
        engine.optimizer.empty_partition_cache()


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """In this context frozen parameters are whole on every rank. Collective where ZeRO-3 has cut them."""
    parameters = list(parameters)
    if not any(hasattr(parameter, "ds_tensor") for parameter in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return cast(AbstractContextManager[None], GatheredParameters(parameters))


def resident_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a parameter that lie on this rank between uses."""
    stored = getattr(parameter, "ds_tensor", parameter)
    return int(stored.numel() * stored.element_size())
