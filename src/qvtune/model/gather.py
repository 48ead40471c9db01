"""Gathering ZeRO-3 parameters, and releasing frozen ones, with less Python than DeepSpeed's own way.

DeepSpeed asks a parameter itself to be gathered, together with others, and to be released. It then handles the parts of
all ranks one by one, for each parameter: 512 parts on 512 GPUs. Here all parts are copied at once, and since a frozen
parameter never changes, to release it is to drop it.
DeepSpeed also keeps the state of each parameter in several of its containers. ``JointParameter`` stands in them for all
frozen parameters of a layer.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from qvtune.distributed import process_group


def use_short_gather(parameter: Any) -> None:
    """Let a frozen parameter, as DeepSpeed has made it, be gathered by ``ShortGather`` and released at once.

    Not where DeepSpeed shards it a second time (hpZ).
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if parameter.ds_zero_param_process_group is not None or process_group.world_size() == 1:
        return

    def partition(param_list: Sequence[Any] | None = None, **keywords: Any) -> None:
        if parameter.ds_status is not ZeroParamStatus.NOT_AVAILABLE:
            _release([parameter])
        for other in param_list or ():  # DeepSpeed asks one for several
            if other is not parameter:
                other.partition(**keywords)

    parameter.all_gather_coalesced = _gather_coalesced
    parameter.partition = partition


def use_one_gather(parameters: Iterable[Any]) -> None:
    """Let all parameters of a model be gathered by ``ShortGather`` if the frozen ones are.

    DeepSpeed asks any one of the parameters that it needs together, the first of a set, which differs from run to run.
    If trained ones gathered in DeepSpeed's own way, so would what buffers are kept, and the peak of memory.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "all_gather_coalesced")]
    if any(_is_short(parameter) for parameter in sharded):
        for parameter in sharded:
            parameter.all_gather_coalesced = _gather_coalesced


def _release(parameters: Sequence[Any]) -> None:
    """Drop what was gathered of frozen parameters, all of one device and dtype."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    first, accelerator = parameters[0].data, get_accelerator()
    nothing = torch.empty(0, dtype=first.dtype, device=first.device)
    if accelerator.on_accelerator(first) and not accelerator.is_synchronized_device():
        stream = accelerator.current_stream()
        for one in parameters:
            one.data.record_stream(stream)  # the device may still compute with it
    for one in parameters:
        assert one.ds_status is ZeroParamStatus.AVAILABLE and not one.ds_active_sub_modules, one.ds_summary()
        one.data = nothing
        one.ds_status = ZeroParamStatus.NOT_AVAILABLE


class JointParameter:
    """Frozen parameters that are always gathered and released together: for DeepSpeed's coordinator one parameter.

    The pieces that this rank keeps of them become parts of one tensor, ``ds_tensor``.
    """

    requires_grad = ds_persist = is_external_param = False
    nvme_swapper = ds_secondary_tensor = None

    def __init__(self, parameters: Sequence[Any]) -> None:
        self.parameters = sorted(parameters, key=lambda one: one.ds_id)
        self.ds_id = self.parameters[0].ds_id
        self.ds_numel = sum(one.ds_numel for one in parameters)
        self.ds_active_sub_modules: set[int] = set()
        self.all_gather_coalesced = _gather_coalesced
        pieces = [one.ds_tensor for one in self.parameters]
        self.ds_tensor = torch.empty(
            sum(piece.numel() for piece in pieces),
            dtype=pieces[0].dtype,
            device=pieces[0].device,
            pin_memory=pieces[0].is_pinned(),
        )
        torch.cat(pieces, out=self.ds_tensor)
        for piece, part in zip(pieces, self.ds_tensor.split([piece.numel() for piece in pieces]), strict=True):
            piece.data = part

    @property
    def ds_status(self) -> Any:
        """That of each of the parameters."""
        return self.parameters[0].ds_status

    @property
    def ds_shape(self) -> torch.Size:
        """For messages."""
        return torch.Size([self.ds_numel])

    def partition_numel(self) -> int:
        """Elements that this rank keeps."""
        return self.ds_tensor.numel()

    def partition(self, **_: Any) -> None:
        """Release all."""
        _release(self.parameters)

    def ds_summary(self, **_: Any) -> list[Any]:
        """For messages."""
        return [one.ds_summary() for one in self.parameters]


def joined(parameters: Iterable[Any]) -> list[Any]:
    """Those of a layer that do not stay gathered; one ``JointParameter`` for all that ``ShortGather`` releases."""
    frozen: list[Any] = []
    others: list[Any] = []
    for one in parameters:
        if not one.ds_persist:
            (frozen if _is_short(one) and not one.requires_grad else others).append(one)
    return [JointParameter(frozen), *others] if frozen else others


def _is_short(parameter: Any) -> bool:
    return getattr(parameter, "all_gather_coalesced", None) is _gather_coalesced


def _gather_coalesced(parameters: Iterable[Any], **_: Any) -> "ShortGather":
    return ShortGather(sorted(parameters, key=lambda one: one.ds_id))


class ShortGather:
    """One collective for several parameters of one dtype, and the handle that DeepSpeed waits for."""

    def __init__(self, given: list[Any]) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self._parameters = [one for several in given for one in getattr(several, "parameters", (several,))]
        self._numels = [parameter.ds_tensor.numel() for parameter in self._parameters]
        device, dtype = self._parameters[0].device, given[0].ds_tensor.dtype
        self._buffer: Any = torch.empty(process_group.world_size(), sum(self._numels), dtype=dtype, device=device)
        own = self._buffer[process_group.rank()]
        torch.cat([one.ds_tensor.to(device, non_blocking=True) for one in given], out=own)
        self._work: Any = process_group.start_all_gather(self._buffer.view(-1), own)
        for parameter in self._parameters:
            assert parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE, parameter.ds_summary()
            parameter.ds_status = ZeroParamStatus.INFLIGHT

    def wait(self, **_: Any) -> None:
        """Give the parameters their values; the second time do nothing."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if self._work is None:
            return
        self._work.wait()
        for parameter, parts in zip(self._parameters, self._buffer.split(self._numels, dim=1), strict=True):
            whole = parts.contiguous().view(-1)[: parameter.ds_numel]
            parameter.data = whole if parameter.ds_shape == whole.shape else whole.view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._work = self._buffer = None
