"""Packed rows -> tensors. B: rows of the micro-batch, T: tokens per row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from qvtune.data import IGNORE_INDEX
from qvtune.data.packing import PackedRow

LENGTH_MULTIPLE = 8  # of T: matrix units compute in tiles, and fewer distinct shapes fragment memory less


@dataclass(frozen=True)
class Batch:
    """A micro-batch: [B, T] int64 tensors, and the document borders for attention kernels of variable length.

    ``labels[b, t]`` is the id that position t must predict, IGNORE_INDEX at a document's last token and wherever there
    is no loss: the loss does not shift. ``position_ids`` count from 0 in each document. ``cu_seqlens`` [documents + 1]
    int32 are offsets into the B*T flattened tokens; the padding of a row is a document of its own, so the last entry is
    B*T. ``max_seqlen`` is the longest document's length. ``label_positions`` [N] int64 are the places of the labels
    among the flattened tokens, ascending: to look for them on a GPU, the host would have to wait for it.
    ``token_type_ids`` is None for models that have no such types.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    label_positions: torch.Tensor
    token_type_ids: torch.Tensor | None = None

    @property
    def num_label_tokens(self) -> int:
        """Positions that have a label."""
        return len(self.label_positions)

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with its tensors on ``device``; a copy from pinned memory does not wait for the device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Return the batch in memory that a GPU can read by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)


def collate(rows: Sequence[PackedRow], pad_token_id: int, *, shift: bool = True) -> Batch:
    """Stack rows, padded at the right to the length of the longest, rounded up to LENGTH_MULTIPLE.

    ``shift``: labels are tokens, which the position before has to predict; else each stays at its position.
    """
    length = round_up(max(len(row.input_ids) for row in rows))
    input_ids = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    token_type_ids = np.zeros_like(input_ids) if any(len(row.token_type_ids) for row in rows) else None
    segments: list[int] = []
    for index, row in enumerate(rows):
        num_tokens = len(row.input_ids)
        assert row.document_lengths.sum() == num_tokens
        input_ids[index, :num_tokens] = row.input_ids
        if shift:
            labels[index, : num_tokens - 1] = row.labels[1:]
            labels[index, np.cumsum(row.document_lengths) - 1] = IGNORE_INDEX
        else:
            labels[index, :num_tokens] = row.labels
        if token_type_ids is not None:
            token_type_ids[index, :num_tokens] = row.token_type_ids
        segments.extend(row.document_lengths.tolist())
        if num_tokens < length:
            segments.append(length - num_tokens)
    return with_segments(input_ids, labels, segments, token_type_ids)


def padding_token(tokenizer: Any) -> int:
    """The token behind the end of a row. It has no label, and no other token attends to it: any token will do."""
    found: int = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    return found


def empty_batch(pad_token_id: int) -> Batch:
    """Return one row of padding, for a rank without rows whose part of the model the other ranks still need."""
    input_ids = np.full((1, LENGTH_MULTIPLE), pad_token_id, dtype=np.int64)
    return with_segments(input_ids, np.full_like(input_ids, IGNORE_INDEX), [LENGTH_MULTIPLE])


def with_segments(
    input_ids: np.ndarray, labels: np.ndarray, segments: Sequence[int], token_type_ids: np.ndarray | None = None
) -> Batch:
    """A batch of arrays [B, T] whose flattened tokens are documents of the lengths ``segments``."""
    position_ids = np.concatenate([np.arange(segment, dtype=np.int64) for segment in segments])
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids.reshape(input_ids.shape)),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *segments], dtype=np.int32)),
        max_seqlen=max(segments),
        label_positions=torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX)),
        token_type_ids=None if token_type_ids is None else torch.from_numpy(token_type_ids),
    )


def round_up(length: int) -> int:
    """To a multiple of LENGTH_MULTIPLE."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
