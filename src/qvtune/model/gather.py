"""Gathering ZeRO-3 parameters, and releasing frozen ones, with less Python than DeepSpeed's own way.

DeepSpeed asks a parameter itself to be gathered, together with others, and to be released. It then handles the parts of
all ranks one by one, for each parameter: 512 parts on 512 GPUs. Here all parts are copied at once, and since a frozen
parameter never changes, to release it is to drop it.
"""

from collections.abc import Iterable
from typing import Any

import torch

from qvtune.distributed import process_group


def use_short_gather(parameter: Any) -> None:
    """Let a frozen parameter, as DeepSpeed has made it, be gathered by ``ShortGather`` and released at once.

    Not where DeepSpeed shards it a second time (hpZ).
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param

    if parameter.ds_zero_param_process_group is not None or process_group.world_size() == 1:
        return

    def partition(*_: Any, **__: Any) -> None:
        assert parameter.ds_status is not ZeroParamStatus.INFLIGHT, parameter.ds_summary()
        if parameter.ds_status is ZeroParamStatus.AVAILABLE:
            free_param(parameter)

    parameter.all_gather_coalesced = _gather_coalesced
    parameter.partition = partition


def use_one_gather(parameters: Iterable[Any]) -> None:
    """Let all parameters of a model be gathered by ``ShortGather`` if the frozen ones are.

    DeepSpeed asks any one of the parameters that it needs together, the first of a set, which differs from run to run.
    If trained ones gathered in DeepSpeed's own way, so would what buffers are kept, and the peak of memory.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "all_gather_coalesced")]
    if any(parameter.all_gather_coalesced is _gather_coalesced for parameter in sharded):
        for parameter in sharded:
            parameter.all_gather_coalesced = _gather_coalesced


def _gather_coalesced(parameters: Iterable[Any], **_: Any) -> "ShortGather":
    return ShortGather(sorted(parameters, key=lambda one: one.ds_id))


class ShortGather:
    """One collective for several parameters of one dtype, and the handle that DeepSpeed waits for."""

    def __init__(self, parameters: list[Any]) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self._parameters = parameters
        self._numels = [parameter.ds_tensor.ds_numel for parameter in parameters]
        first = parameters[0]
        self._buffer: Any = torch.empty(
            process_group.world_size(), sum(self._numels), dtype=first.ds_tensor.dtype, device=first.device
        )
        own = self._buffer[process_group.rank()]
        torch.cat([parameter.ds_tensor.to(first.device, non_blocking=True) for parameter in parameters], out=own)
        self._work: Any = process_group.start_all_gather(self._buffer.view(-1), own)
        for parameter in parameters:
            assert parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE, parameter.ds_summary()
            parameter.ds_status = ZeroParamStatus.INFLIGHT

    def wait(self, **_: Any) -> None:
        """Give the parameters their values; the second time do nothing."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if self._work is None:
            return
        self._work.wait()
        for parameter, parts in zip(self._parameters, self._buffer.split(self._numels, dim=1), strict=True):
            parameter.data = parts.contiguous().view(-1)[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._work = self._buffer = None
