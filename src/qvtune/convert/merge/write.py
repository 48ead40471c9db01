"""Writing the merged weights: file after file, several tensors at a time, nothing twice."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch

import qvtune
from qvtune.console import console
from qvtune.convert.conversion import Conversion
from qvtune.convert.merge.tensors import MatrixUpdate, Merger
from qvtune.model import fingerprint
from qvtune.model.families import FAMILIES, encoder_names
from qvtune.model.fingerprint import ContentChecksums, Fingerprint
from qvtune.storage.checksum import partial_checksum
from qvtune.storage.partial import PartialOutput
from qvtune.storage.writer import plan_files, write_file, write_index
from qvtune.system import one_thread


@dataclass(frozen=True)
class Written:
    """The weights as they lie in the folder. ``kinds``: what became of each tensor; ``kept``: the share of the updates
    that is left in 4 bits, None elsewhere."""

    files: list[str]
    num_bytes: int
    kinds: Mapping[str, str]
    updates: list[MatrixUpdate]
    kept: float | None = None


def made_from(conversion: Conversion, max_shard_bytes: int) -> dict[str, Any]:
    """All that decides the bytes of the files, as JSON: a merge that was cut off goes on only where it is the same."""
    return {
        "qvtune": qvtune.__version__,
        "adapter": [
            _identity(conversion.adapter.changes),
            _identity(conversion.adapter.added),
            str(conversion.adapter.dtype),
        ],
        "base": conversion.base.weights.stamps(),
        "base_weights": [conversion.base_weights, conversion.model.double_quant],
        "dtype": str(conversion.dtype),
        "max_shard_bytes": max_shard_bytes,
    }


def _identity(value: Any) -> Any:
    """Tensors by their checksum, whatever holds them by its parts."""
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().flatten().view(torch.uint8)
        return [str(value.dtype), *value.shape, f"{partial_checksum(content, 0):016x}"]
    if isinstance(value, Mapping):
        return {name: _identity(value[name]) for name in sorted(value)}
    if is_dataclass(value):
        return [type(value).__name__, *(_identity(getattr(value, field.name)) for field in fields(value))]
    return repr(value)


def write_weights(
    partial_output: PartialOutput, conversion: Conversion, max_shard_bytes: int, num_threads: int
) -> Written:
    """Write all files that an earlier start has not finished, and the index.

    Raises UserError where the base is not the one of the checkpoint's fingerprint, holds NaN or infinite values, or a
    value does not fit the dtype, DiskFullError where there is no room.
    """
    checksums = ContentChecksums(conversion.base.weights)
    merger = Merger(conversion.base, conversion.adapter, conversion.dtype, checksums)
    plans = merger.plan()
    files = plan_files(plans, max_shard_bytes)
    partial_output.require_room(files)
    recall(partial_output, merger, checksums)
    with one_thread():  # all cores are busy with tensors of their own
        for number, (file, shard) in enumerate(files.items(), start=1):
            write = partial(write_file, plans=shard, pieces=merger.pieces, num_threads=num_threads)
            partial_output.write(file, write, partial(notes, merger, checksums, {plan.name for plan in shard}))
            console().print(f"{number}/{len(files)} {file}")
    require_base(conversion, checksums)
    write_index(partial_output.folder, files)
    kinds = {plan.name: merger.kind(plan.name) for plan in plans}
    updates = [merger.updates[plan.name] for plan in plans if plan.name in merger.updates]
    return Written(list(files), sum(plan.num_bytes for plan in plans), kinds, updates)


def recall(partial_output: PartialOutput, merger: Merger, checksums: ContentChecksums) -> None:
    """Take over what an earlier start has noted of the files that it finished."""
    for noted in partial_output.notes():
        checksums.sums |= noted["base"]
        merger.updates |= {entry["name"]: MatrixUpdate(**entry) for entry in noted["updates"]}


def notes(merger: Merger, checksums: ContentChecksums, names: set[str]) -> dict[str, Any]:
    """What the next start has to know of the tensors of a file that it will not read again."""
    checksums.require_finite()
    updates = [asdict(merger.updates[name]) for name in sorted(names & merger.updates.keys())]
    return {"updates": updates, "base": dict(checksums.sums)}


def require_base(conversion: Conversion, checksums: ContentChecksums) -> None:
    """Compare all that has been read of the base with what the checkpoint was trained on, where it says so.

    Raises UserError naming the tensors that differ, or that hold NaN or infinite values.
    """
    content, expected = conversion.base.fingerprint(checksums), conversion.source.fingerprint
    if expected is not None:
        content = _names_of_training(conversion, content)
        advice = f"{conversion.source.path} was trained on another base; give that one"
        same_heads = not conversion.is_classifier  # which has a head of its own
        fingerprint.require_same(expected, content, "the base (model.name_or_path)", advice, same_heads=same_heads)


def _names_of_training(conversion: Conversion, content: Fingerprint) -> Fingerprint:
    """Training reads an encoder's checkpoint under the names of the bare encoder; a merge into the original weights
    keeps those of the files, which may have a prefix and a head."""
    config = json.loads((conversion.base.folder / "config.json").read_text(encoding="utf-8"))
    family = FAMILIES.get(config.get("model_type"))
    if conversion.base.opened is not None or family is None or not family.is_encoder:
        return content
    return {new: content[name] for new, name in encoder_names(content, config["model_type"]).items()}


def merged_config(conversion: Conversion) -> dict[str, Any]:
    """The base's config.json for the merged weights, which are to be computed with in ``conversion.dtype``."""
    config: dict[str, Any] = json.loads((conversion.base.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # what "dtype" was called before transformers 4.56
    config.pop("quantization_config", None)
    dtype = str(conversion.dtype).removeprefix("torch.")
    return {**config, **conversion.settings, "dtype": dtype}
