"""``bnb-4bit``: merged and quantized again, an ordinary folder in bitsandbytes' 4-bit format.

The merge is read as if it were a folder of weights, one matrix at a time, by what quantizes bases: nothing lies on the
disk in between. A shard and a matrix are in memory.

Values that came out of NF4 go back to where they were when a small update is added and they are quantized again: of the
demo's updates 14 % are left (loss 2.76, with the adapter 2.52, without 3.02). Added to the original weights, which lie
anywhere between the 16 values, they survive on average: 99.6 % (loss 2.54). Hence ``original`` is what this format
merges into unless told otherwise, and the share of the updates that is left is part of its proof.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial as bind
from pathlib import Path

import torch

from qvtune.config.outputs import NF4_SHARD_BYTES, BaseChoice
from qvtune.config.schema import ModelSection
from qvtune.convert.conversion import Conversion
from qvtune.convert.formats import merged
from qvtune.convert.merge.base import open_merge_base
from qvtune.convert.merge.tensors import Merger
from qvtune.convert.merge.write import Written, merged_config, notes, recall, require_base
from qvtune.convert.proof.proof import Limits
from qvtune.convert.proof.views import ModelView, ModelViews, as_stored, model_views
from qvtune.convert.serving import write_companions
from qvtune.errors import ProofError, UserError
from qvtune.model.fingerprint import ContentChecksums
from qvtune.model.loader import check_tensors, quantized_layouts
from qvtune.model.nf4 import Layout
from qvtune.model.quantize import finish, plan_shards, write_shards
from qvtune.model.skeleton import build_skeleton, read_model_config
from qvtune.storage.partial import PartialOutput
from qvtune.storage.safetensors import StoredTensor, TensorSource

PREFERS: BaseChoice | None = "original"
# SmolLM2-135M: 86 %, KL 0.07 where it was trained on NF4, 78 %, KL 0.22 where it was not; larger models move less.
# Quantizing hides small faults here: they show in the share of the updates that is left.
QUANTIZED = Limits(top1_agreement=0.7, max_abs_difference=None, mean_kl=0.4)
_SHARE_OFF_BY = 0.05  # half of what a scaling that is wrong by a tenth gives; the demo's is off by 0.004


@dataclass
class MergedTensors(TensorSource):
    """The tensors that a merge gives, computed when they are read: whole, and kept until another is wanted."""

    merger: Merger
    _held: tuple[str, torch.Tensor] = field(default=("", torch.empty(0)), init=False)

    def read(self, name: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """As ``TensorSource``."""
        if self._held[0] != name:
            self._held = ("", torch.empty(0))  # before the next one is made
            self._held = (name, torch.cat(list(self.merger.pieces(name))))
        return self._held[1][start:end]


def require(conversion: Conversion) -> None:
    """Raises UserError for what is no causal language model of a family whose matrices are known."""
    if conversion.is_classifier:
        raise UserError("--format bnb-4bit: writes causal language models, not classifiers; use --format merged")
    _open(conversion, ContentChecksums(conversion.base.weights))


def _open(conversion: Conversion, checksums: ContentChecksums) -> tuple[MergedTensors, dict[str, Layout]]:
    """The merged tensors, nothing computed yet, and the layouts of those that are to be quantized."""
    merger = Merger(conversion.base, conversion.adapter, conversion.dtype, checksums)
    tensors = {
        plan.name: StoredTensor(plan.name, conversion.base.folder, number, plan.num_bytes, plan.shape, plan.dtype)
        for number, plan in enumerate(merger.plan())
    }
    weights = MergedTensors(conversion.base.folder, tensors, merger)
    config = read_model_config(conversion.base.folder, conversion.model)
    config.update(conversion.settings)
    skeleton = build_skeleton(config, _section(conversion), conversion.dtype, "sdpa")
    check_tensors(skeleton, weights, {})
    return weights, quantized_layouts(skeleton)


def _section(conversion: Conversion) -> ModelSection:
    return conversion.source.model.model_copy(update={"quantization": "nf4"})


def write(partial: PartialOutput, conversion: Conversion, max_shard_bytes: int, num_threads: int) -> Written:
    """As ``OutputFormat``; files of 1 GB at most, which are made in memory."""
    checksums = ContentChecksums(conversion.base.weights)
    weights, layouts = _open(conversion, checksums)
    merger = weights.merger
    files = plan_shards(weights, layouts, min(max_shard_bytes, NF4_SHARD_BYTES))
    recall(partial, merger, checksums)
    write_shards(partial, weights, layouts, files, bind(notes, merger, checksums))
    require_base(conversion, checksums)
    write_companions(conversion, partial.folder)
    finish(partial, _section(conversion).double_quant, merged_config(conversion))
    kinds = {name: "quantized" if name in layouts else merger.kind(name) for name in weights}
    num_bytes = sum(plan.num_bytes for plans in files.values() for plan in plans)
    kept = _require_updates(conversion, partial.folder, sorted(conversion.adapter.changes.keys() & layouts.keys()))
    return Written(list(files), num_bytes, kinds, list(merger.updates.values()), kept)


def _require_updates(conversion: Conversion, folder: Path, names: Collection[str]) -> float:
    """The share of what the adapter adds to ``names`` that is left in ``folder``: <D - W, dW> / <dW, dW> over all.

    Raises ProofError where it is further from 1 than errors of quantization, which know nothing of dW, explain.
    """
    base, written = as_stored(conversion.base), _written(conversion, folder)
    left = whole = noise = 0.0
    num_weights = 0
    for name in names:
        before = base.rows(name)
        update = conversion.adapter.changes[name].apply(before) - before
        found = written.rows(name) - before
        left += torch.sum(found * update, dtype=torch.float64).item()
        whole += torch.sum(update * update, dtype=torch.float64).item()
        noise += torch.sum((found - update).square(), dtype=torch.float64).item()
        num_weights += update.numel()
    if not whole:
        return 1.0
    chance = 4 * math.sqrt(noise / whole / num_weights)
    if not abs(left / whole - 1) <= _SHARE_OFF_BY + chance:
        raise ProofError(
            f"{left / whole:.1%} of the adapter's updates are left after quantizing, expected 100 %: added to values "
            "that came out of NF4, they go back to where they were. Merge into the original weights: --base-weights "
            "original, with --base where the run's own base is stored in 4 bits; or use --format merged"
        )
    return left / whole


def views(conversion: Conversion, folder: Path) -> ModelViews:
    """What was trained, with the weights it was trained on, against the 4-bit folder."""
    found = model_views(conversion, _written(conversion, folder))
    return replace(found, reference=found.adapted)


def _written(conversion: Conversion, folder: Path) -> ModelView:
    return as_stored(open_merge_base(folder, _section(conversion), conversion.dtype))


def limits(conversion: Conversion) -> Limits:
    """As ``OutputFormat``."""
    return QUANTIZED


how_to_load = merged.how_to_load
how_to_serve = merged.how_to_serve
arguments = merged.arguments
