"""Keys of the DeepSpeed configuration: none that a run may have changes a bit of the stored base."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel

from qvtune.config.deepspeed_keys import ALLOWED_KEYS, REFUSED_KEYS
from qvtune.config.problems import section_type
from qvtune.versions import repository
from tests.distributed.conftest import Results
from tests.distributed.gathered import NUM_LAYERS
from tests.support.lab import Lab

# Values that differ from DeepSpeed's defaults and from ds_configs/. Keys that could disable each other are apart.
ANY_STAGE: dict[str, Any] = {
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "reduce_bucket_size": 100_000,
    "use_multi_rank_bucket_allreduce": False,
    "allgather_partitions": False,
    "allgather_bucket_size": 1000,
    "overlap_comm": False,
    "load_from_fp32_weights": False,
    "elastic_checkpoint": True,
    "sub_group_size": 1000,
    "ignore_unused_parameters": False,
    "round_robin_gradients": True,
    "parameter_alignment": True,
    "memory_efficient_linear": False,
    "pipeline_loading_checkpoint": True,
    "override_module_apply": False,
    "log_trace_cache_warnings": True,
    "enable_sanity_checks": True,
    "save_muon_momentum_buffer_in_memory": True,
}
# Each is a run.
ZERO3: list[dict[str, Any]] = [
    {},
    {**ANY_STAGE, "stage3_gather_16bit_weights_on_model_save": True},
    {"stage3_allgather_sequential": True},
    {"stage3_module_granularity_threshold": 10**9},
    {"leaf_module": {"classes": ["tests.distributed.gathered.Layer"]}},
    {"leaf_module": {"names": ["0"], "name_suffixes": ["2"]}},
    {
        "stage3_prefetch_bucket_size": 10**6,
        "stage3_max_live_parameters": 10**8,
        "stage3_max_reuse_distance": 10**8,
        "stage3_param_persistence_threshold": 3000,  # more than the statistics have, less than the codes
        "stage3_model_persistence_threshold": 6000,
    },
    {
        "offload_param": {
            "device": "cpu",
            "pin_memory": False,
            "nvme_path": "none",
            "buffer_count": 2,
            "buffer_size": 1000,
            "max_in_cpu": 1000,
        }
    },
    {
        "offload_optimizer": {
            "device": "cpu",
            "pin_memory": False,
            "nvme_path": "none",
            "buffer_count": 2,
            "pipeline_read": True,
            "pipeline_write": True,
            "fast_init": True,
            "cpuadam_cores_perc": 0.5,
        }
    },
    {"zero_hpz_partition_size": 2},
    {"zero_quantized_gradients": True},
]
# Outside of zero_optimization; the other allowed keys have only the value of the run.
TOP: dict[str, Any] = {
    "bf16": {"check_grad_overflow": False},
    "communication_data_type": "bf16",
    "data_types": {"grad_accum_dtype": "bf16"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 1,
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "dump_state": True,
    "log_level": "error",
    "comms_logger": {"enabled": True},
    "flops_profiler": {"enabled": True, "profile_step": 2},
}
OF_THE_RUN = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
CASES = [("zero3.json", case, {}) for case in ZERO3] + [("zero2.json", ANY_STAGE, {})]
CASES += [(file, {}, TOP) for file in ("zero3.json", "zero2.json")]


def content(file: str, zero: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """A file of ds_configs/ with some keys set."""
    loaded: dict[str, Any] = json.loads((repository() / "ds_configs" / file).read_text())
    more = {"zero_force_ds_cpu_optimizer": False} if "offload_optimizer" in zero else {}
    return {**loaded, **more, **top, "zero_optimization": {**loaded["zero_optimization"], **zero}}


@pytest.fixture(scope="module")
def results(lab: Lab) -> Results:
    """What the runs of ``CASES`` gathered on 2 ranks, in one launch; and one more, with a refused key."""
    job = {
        "name": "gathered",
        "do": "gathered",
        "folder": str(lab.folder),
        "cases": [content(*case) for case in CASES],
        "bypassing": {"stage3_use_all_reduce_for_fetch_params": True},
    }
    for end in lab.launch("keys", 2, [job]):
        assert end.code == 0, end.output
    return lab.results("keys", 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gathered_bytes_are_those_stored_whatever_a_key_says(results: Results, dtype: str) -> None:
    for result in results:
        different = result["gathered"][dtype][:-1]
        assert len(different) == len(CASES)
        assert [(case, pieces) for case, pieces in zip(CASES, different, strict=True) if pieces] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_comparison_sees_what_the_refused_sum_with_zeros_changes(results: Results, dtype: str) -> None:
    """-0.0 + 0.0 is 0.0, and a sum with a signalling NaN is a quiet one."""
    for result in results:
        assert {f"{layer}.weight" for layer in range(NUM_LAYERS)} <= set(result["gathered"][dtype][-1])


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what is in nested dictionaries."""
    for key, item in value.items():
        name = f"{path}{key}"
        if isinstance(item, dict):
            yield from leaves(item, f"{name}.")
        else:
            yield name, item


def settings(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and defaults of the keys of zero_optimization that a run may have."""
    for name, field in model.model_fields.items():
        key = f"{path}{field.alias or name}"
        block = section_type(field.annotation)
        if f"zero_optimization.{key}" in REFUSED_KEYS:
            continue
        if block is None:
            yield key, field.get_default(call_default_factory=True)
        else:
            yield from settings(block, f"{key}.")


def test_every_key_is_refused_or_gathered_with() -> None:
    """A key that a new version of DeepSpeed brings has to be put into ``REFUSED_KEYS`` or ``ZERO3``."""
    accepted = dict(settings(DeepSpeedZeroConfig))
    exercised = [pair for case in ZERO3 for pair in leaves(case)]
    assert accepted.keys() - dict(exercised).keys() == {"stage"}  # which all cases have
    defaults = accepted | content("zero3.json", {}, {})["zero_optimization"]
    assert [key for key, value in exercised if value == defaults[key]] == []
    assert set(ALLOWED_KEYS[""]) == OF_THE_RUN | TOP.keys() | {"zero_optimization"}


def test_both_spellings_of_a_refused_key_are_refused() -> None:
    """DeepSpeed takes the name of a field as well as its alias."""
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        spellings = {f"zero_optimization.{key}" for key in (name, field.alias) if key}
        assert not spellings & REFUSED_KEYS.keys() or spellings <= REFUSED_KEYS.keys()
