"""Resolves the DeepSpeed JSON of a run: fills every "auto", reports everything that contradicts the run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qvtune.config.deepspeed_keys import ALLOWED_KEYS, REFUSED_KEYS
from qvtune.config.problems import closest, describe, suggestion
from qvtune.config.schema import RunConfig
from qvtune.errors import UserError
from qvtune.versions import repository

AUTO = "auto"  # `deepspeed: auto`, of a run; qvtune.train.stage chooses the file
PERSISTENCE = "stage3_param_persistence_threshold"
_STAGES = (2, 3)
_HPZ = "zero_hpz_partition_size"
_STAGE_3_ONLY = ("leaf_module", "offload_param", _HPZ)


@dataclass(frozen=True)
class LayerSizes:
    """What an "auto" of zero_optimization is filled from: the decoder layers of a model with its adapters.

    Attributes:
        classes: names of the classes of the layers.
        gathered_numel: elements that are gathered to run the largest layer, as they are stored.
        persistent_numel: parameters of at most so many elements stay whole on every rank.
    """

    classes: tuple[str, ...]
    gathered_numel: int
    persistent_numel: int

    def values(self) -> dict[str, Any]:
        """Key of zero_optimization -> its value."""
        return {
            "leaf_module": {"classes": list(self.classes)},
            "stage3_max_live_parameters": 2 * self.gathered_numel,
            "stage3_prefetch_bucket_size": self.gathered_numel,
            PERSISTENCE: self.persistent_numel,
        }


_FROM_MODEL = LayerSizes((), 0, 0).values().keys()


def resolve_deepspeed(
    config: RunConfig, world_size: int, dtype: str, ranks_per_node: int | None = None
) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize`` of a run on ``world_size`` ranks that computes in ``dtype``.

    ``config.deepspeed`` is a path, or the name of a file in ds_configs/. Batch sizes, clipping and precision belong to
    the run: if the JSON has "auto" or nothing, they are filled in; if it has a value, it must be that of the run.
    An "auto" that depends on the model stays, for ``fill_from_model``.

    Args:
        dtype: ``float32`` or ``bfloat16``, as resolved for the device.
        ranks_per_node: what ``zero_hpz_partition_size: auto`` becomes; None: all ranks are on one node.

    Raises:
        UserError: with every problem at once: an unreadable file, a key that is unknown or refused, a value that
            DeepSpeed does not take or that contradicts the run, an "auto" that nothing fills, a batch that cannot be
            split.
    """
    assert world_size > 0 and dtype in ("float32", "bfloat16"), (world_size, dtype)
    path = find_json(config.deepspeed)
    resolved, problems = _read_json(path)
    problems += _take_refused(resolved)
    problems += _key_problems(resolved)
    problems += _fill(resolved, _values_of_run(config, world_size, dtype))
    if resolved["zero_optimization"].get(_HPZ) == "auto":
        resolved["zero_optimization"][_HPZ] = ranks_per_node or world_size
    problems += [
        f'`{name}` is "auto", but the run has no value for it; give one'
        for name in _autos(resolved)
        if name not in {f"zero_optimization.{key}" for key in _FROM_MODEL}
    ]
    problems += _zero_problems(resolved, world_size)
    problems = _batch_problems(config, world_size) + [f"{path}: {problem}" for problem in problems]
    if problems:
        raise UserError(problems)
    return resolved


def fill_from_model(resolved: dict[str, Any], layers: LayerSizes) -> dict[str, Any]:
    """``resolved`` with each "auto" that depends on the model filled in."""
    zero = resolved["zero_optimization"]
    filled = {key: value for key, value in layers.values().items() if zero.get(key) == "auto"}
    return resolved | {"zero_optimization": zero | filled}


def find_json(name: str) -> Path:
    """The file called ``name``: a path, or a file in the repository's ds_configs/. UserError if there is none."""
    folder = repository() / "ds_configs"
    for path in (Path(name), folder / name):
        if path.is_file():
            return path
    there = sorted(file.name for file in folder.glob("*.json"))
    hint = suggestion(closest(name, [AUTO, *there]), [AUTO, *there]) if there else f"and there is no folder {folder}"
    raise UserError(f"`deepspeed` is {name!r}: neither {AUTO}, a file, nor the name of one in ds_configs/; {hint}")


def _read_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The object in ``path``, and a problem for each duplicate key."""
    problems: list[str] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        problems.extend(f"`{key}` is set twice; keep one" for key in dict.fromkeys(keys) if keys.count(key) > 1)
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=to_dict)
    except OSError as error:
        raise UserError(f"{path}: the DeepSpeed configuration cannot be read ({error.strerror})") from error
    except ValueError as error:  # also what a file that is not UTF-8 raises
        raise UserError(f"{path}: the DeepSpeed configuration is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: the DeepSpeed configuration must be a JSON object, not a {type(content).__name__}")
    return content, problems


def _take_refused(resolved: dict[str, Any]) -> list[str]:
    """Remove the refused keys, so that no other check finds them; a problem for each."""
    problems = []
    for name, reason in REFUSED_KEYS.items():
        *blocks, key = name.split(".")
        block: Any = resolved
        for part in blocks:
            block = block.get(part) if isinstance(block, dict) else None
        if isinstance(block, dict) and key in block:
            del block[key]
            problems.append(f"`{name}` is refused: {reason}; remove it")
    return problems


def _key_problems(resolved: dict[str, Any]) -> list[str]:
    """Problems for unknown keys; a block that is not an object is reported and replaced by an empty one."""
    problems = []
    for block in ("bf16", "data_types", "zero_optimization"):
        if not isinstance(resolved.setdefault(block, {}), dict):
            problems.append(f"`{block}` is {resolved[block]!r}; it must be an object of settings")
            resolved[block] = {}
    for block, allowed in ALLOWED_KEYS.items():
        prefix = f"{block}." if block else ""
        unknown = [key for key in (resolved[block] if block else resolved) if key not in allowed]
        problems += [
            f"`{prefix}{key}` is not a setting; {suggestion(closest(key, allowed), allowed)}" for key in unknown
        ]
    return problems


def _values_of_run(config: RunConfig, world_size: int, dtype: str) -> dict[tuple[str, str], tuple[Any, str]]:
    """(block, key) -> the value that the run has for it, and the setting that it comes from."""
    train = config.train
    accumulation = max(1, train.global_batch_size // (train.micro_batch_size * world_size))
    return {
        ("", "train_batch_size"): (train.global_batch_size, "train.global_batch_size"),
        ("", "train_micro_batch_size_per_gpu"): (train.micro_batch_size, "train.micro_batch_size"),
        ("", "gradient_accumulation_steps"): (
            accumulation,
            f"train.global_batch_size / (train.micro_batch_size x {world_size} ranks)",
        ),
        ("", "gradient_clipping"): (config.optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        ("bf16", "enabled"): (dtype == "bfloat16", f"computing in {dtype} (model.dtype: {config.model.dtype})"),
    }


def _fill(resolved: dict[str, Any], values: Mapping[tuple[str, str], tuple[Any, str]]) -> list[str]:
    """Set each key that is "auto" or missing; return a problem for each value that differs from the run's."""
    problems = []
    for (block, key), (value, origin) in values.items():
        section = resolved[block] if block else resolved
        found = section.setdefault(key, "auto")
        if found == "auto":
            section[key] = value
        elif found != value:
            name = f"{block}.{key}" if block else key
            problems.append(
                f"`{name}` is {json.dumps(found)}, but the run has {json.dumps(value)} from {origin}; "
                f'write "auto", or make the two equal'
            )
    return problems


def _autos(value: Any, name: str = "") -> Iterator[str]:
    """Dotted names of what is still "auto"."""
    if value == "auto":
        yield name
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _autos(item, f"{name}.{key}" if name else key)


def _zero_problems(resolved: dict[str, Any], world_size: int) -> list[str]:
    """Problems of zero_optimization: what DeepSpeed would refuse, ignore or misinterpret."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # here: importing DeepSpeed takes seconds

    zero = resolved["zero_optimization"]
    stage = zero.get("stage")
    problems = []
    if stage not in _STAGES:
        found = f"is {json.dumps(stage)}" if "stage" in zero else "is not set"
        allowed = "allowed: 3 (base, gradients and optimizer sharded), 2 (base whole on every rank)"
        problems.append(f"`zero_optimization.stage` {found}; {allowed}")
    try:
        current = {key: value for key, value in zero.items() if not (value == "auto" and key in _FROM_MODEL)}
        DeepSpeedZeroConfig(**{**current, "stage": stage if stage in _STAGES else 3})
    except ValidationError as error:
        problems += [describe(detail, DeepSpeedZeroConfig, ("zero_optimization",)) for detail in error.errors()]
    if stage == 2:
        idle = [key for key in zero if key.startswith("stage3_") or key in _STAGE_3_ONLY]
        problems += [f"`zero_optimization.{key}` has no effect at stage 2; remove it, or use stage 3" for key in idle]
    return problems + _placement_problems(resolved, world_size)


def _placement_problems(resolved: dict[str, Any], world_size: int) -> list[str]:
    """Problems of zero_optimization that depend on the number of ranks or on the optimizer."""
    zero = resolved["zero_optimization"]
    problems = []
    node_size = zero.get(_HPZ, 1)
    if isinstance(node_size, int) and node_size > 1 and world_size % min(node_size, world_size):
        problems.append(
            f"`zero_optimization.{_HPZ}` is {node_size}, which does not divide {world_size} ranks; "
            "set it to the number of GPUs per node, or use zero3.json"
        )
    if _device(zero, "offload_param") == "nvme":
        problems.append(
            '`zero_optimization.offload_param.device` is "nvme", but a rank keeps its partition of the base in memory; '
            'allowed: "cpu", "none"'
        )
    device = _device(zero, "offload_optimizer")
    if device != "none" and resolved.get("zero_force_ds_cpu_optimizer") is not False:
        problems.append(
            f'`zero_optimization.offload_optimizer.device` is "{device}": add `"zero_force_ds_cpu_optimizer": false`, '
            "because the optimizer is torch's AdamW and DeepSpeed would insist on its own"
        )
    return problems


def _device(zero: dict[str, Any], block: str) -> Any:
    """Where a block of zero_optimization puts things."""
    offload = zero.get(block)
    return offload.get("device", "none") if isinstance(offload, dict) else "none"


def _batch_problems(config: RunConfig, world_size: int) -> list[str]:
    """A problem with its remedies unless every rank has a whole number of micro-batches per optimizer step."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    rows = micro * world_size
    if batch % rows == 0:
        return []
    ways = []
    if batch % world_size == 0:
        ways.append(f"with {world_size} ranks `train.micro_batch_size` may be {_divisors(batch // world_size)}")
    if batch % micro == 0:
        ways.append(f"with `train.micro_batch_size={micro}` the number of ranks may be {_divisors(batch // micro)}")
    near = [size for size in (batch - batch % rows, batch - batch % rows + rows) if size]
    ways.append(f"or set `train.global_batch_size` to {' or '.join(map(str, near))}")
    return [
        f"`train.global_batch_size` is {batch}, which cannot be split into micro-batches of {micro} on {world_size} "
        f"ranks ({batch} / {rows} is not whole); {'; '.join(ways)}"
    ]


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
