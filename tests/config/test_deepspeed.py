"""The DeepSpeed JSON: filled from the run, every contradiction named, and accepted by DeepSpeed itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from qvtune.config.deepspeed import LayerSizes, fill_from_model, resolve_deepspeed
from qvtune.config.deepspeed_keys import ALLOWED_KEYS, REFUSED_KEYS
from qvtune.config.load import load_config
from qvtune.config.problems import section_type
from qvtune.config.schema import OptimizerSection, RunConfig, TrainSection
from qvtune.errors import UserError

ROOT = Path(__file__).parents[2]
JSONS = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
LAYERS = LayerSizes(("MyLayer",), gathered_numel=1000, persistent_numel=30)
WORLD_SIZES = {
    "demo": (1, 2, 3, 6),
    "glue_sst2": (1, 2),
    "llama3_8b_qv": (8, 16, 24, 32),
    "llama3_70b_qv": (8, 16, 32, 64),
}


def config_of(deepspeed: str | Path = "zero3.json", batch: int = 12, micro: int = 2) -> RunConfig:
    train = TrainSection(max_steps=1, global_batch_size=batch, micro_batch_size=micro)
    optimizer = OptimizerSection(max_grad_norm=0.25)
    return RunConfig(run_dir="x", deepspeed=str(deepspeed), train=train, optimizer=optimizer)


def problems_of(folder: Path, content: dict[str, Any], world_size: int = 2, dtype: str = "float32") -> tuple[str, ...]:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        resolve_deepspeed(config_of(path), world_size, dtype)
    assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)
    return tuple(problem.removeprefix(f"{path}: ") for problem in caught.value.problems)


def only_problem(folder: Path, content: dict[str, Any], world_size: int = 2, dtype: str = "float32") -> str:
    problems = problems_of(folder, content, world_size, dtype)
    assert len(problems) == 1, problems
    return problems[0]


def stage3(**more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **more}}


def test_discovery_finds_every_file_and_recipe() -> None:
    assert set(JSONS) >= {"zero2.json", "zero3.json", "zero3_offload.json", "zero3_hpz.json"}
    assert {path.stem for path in (ROOT / "launch" / "recipes").glob("*.yaml")} == set(WORLD_SIZES)
    table = (ROOT / "ds_configs" / "README.md").read_text()
    for name in JSONS:
        content = json.loads((ROOT / "ds_configs" / name).read_text())
        keys = [key for key in (*content, *content["zero_optimization"]) if key not in ("bf16", "data_types")]
        assert f"`{name}`" in table
        assert [
            key for key in keys if f"`{key}" not in table and f".{key}`" not in table and key != "zero_optimization"
        ] == []


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize("recipe", WORLD_SIZES)
def test_every_file_resolves_with_every_recipe(name: str, recipe: str) -> None:
    config = load_config(ROOT / "launch" / "recipes" / f"{recipe}.yaml", [f"deepspeed={name}"])
    for world_size in WORLD_SIZES[recipe]:
        resolved = resolve_deepspeed(config, world_size, "bfloat16")
        micro, accumulation = resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]
        assert micro * accumulation * world_size == config.train.global_batch_size
        assert "auto" not in json.dumps(fill_from_model(resolved, LAYERS))


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deepspeed_reads_what_was_meant(name: str, dtype: str) -> None:
    accepted = DeepSpeedConfig(fill_from_model(resolve_deepspeed(config_of(name), 1, dtype, ranks_per_node=8), LAYERS))
    assert (accepted.train_batch_size, accepted.train_micro_batch_size_per_gpu) == (12, 2)
    assert accepted.gradient_accumulation_steps == 6
    assert accepted.gradient_clipping == 0.25
    assert accepted.bfloat16_config.enabled == (dtype == "bfloat16")
    assert accepted.grad_accum_dtype == "fp32"
    assert accepted.zero_config.stage == (2 if name == "zero2.json" else 3)
    if accepted.zero_config.stage == 3:
        assert accepted.zero_config.leaf_module.classes == ["MyLayer"]
        assert accepted.zero_config.param_persistence_threshold == 30
        assert accepted.zero_config.max_reuse_distance == 0
        assert accepted.zero_config.prefetch_bucket_size == 1000
        assert accepted.zero_config.max_live_parameters == 2000
    assert (accepted.zero_config.offload_param is not None) == (name == "zero3_offload.json")
    assert accepted.zero_config.zero_hpz_partition_size == (8 if name == "zero3_hpz.json" else 1)


class Recording(dict[str, Any]):
    """A dictionary that notes which keys are asked for."""

    asked: set[str]

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def test_every_allowed_key_is_one_that_deepspeed_reads() -> None:
    """Against DeepSpeed's own code: a key that it never asks for would be ignored without a word."""
    content = Recording(fill_from_model(resolve_deepspeed(config_of(), 1, "float32"), LAYERS))
    content.asked = set()
    content |= {"comms_logger": {"enabled": False}, "flops_profiler": {"enabled": False}}
    DeepSpeedConfig(content)
    assert set(ALLOWED_KEYS[""]) - content.asked == set()


def test_auto_and_absent_keys_are_filled_from_the_run(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(stage3()))
    resolved = resolve_deepspeed(config_of(path), 3, "bfloat16")
    wanted = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.25,
        "bf16": {"enabled": True},
    }
    assert {key: resolved[key] for key in wanted} == wanted
    path.write_text(json.dumps({**wanted, **stage3()}))  # the run's own values may also be written out
    assert resolve_deepspeed(config_of(path), 3, "bfloat16") == resolved


def test_what_is_written_out_or_absent_stays(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    written = {
        "leaf_module": {"classes": ["Other"]},
        "stage3_max_live_parameters": 5,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    }
    assert written.keys() == LAYERS.values().keys()
    for content in (written, {}):
        path.write_text(json.dumps(stage3(**content)))
        resolved = resolve_deepspeed(config_of(path), 1, "bfloat16")
        assert fill_from_model(resolved, LAYERS)["zero_optimization"] == {"stage": 3, **content}


@pytest.mark.parametrize(
    ("content", "name", "setting"),
    [
        ({"train_batch_size": 13}, "train_batch_size` is 13", "12 from train.global_batch_size"),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "train_micro_batch_size_per_gpu` is 1",
            "2 from train.micro_batch_size",
        ),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps` is 1", "3 from train.global_batch_size /"),
        ({"gradient_clipping": 0.5}, "gradient_clipping` is 0.5", "0.25 from optimizer.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "bf16.enabled` is true", "false from computing in float32 (model.dtype: auto)"),
    ],
)
def test_value_that_contradicts_the_run_is_named(
    tmp_path: Path, content: dict[str, Any], name: str, setting: str
) -> None:
    problem = only_problem(tmp_path, {**stage3(), **content})
    assert name in problem
    assert setting in problem
    assert '"auto"' in problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"optimizer": {"type": "AdamW"}}, "`optimizer` is refused: .*learning rate of each parameter group"),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler` is refused: .*#7303, #8171"),
        ({"fp16": {"enabled": "auto"}}, "`fp16` is refused"),
        ({"gradient_cliping": 1}, "`gradient_cliping` is not a setting; did you mean `gradient_clipping`"),
        ({"bf16": {"enable": True}}, r"`bf16\.enable` is not a setting; did you mean `enabled`"),
        ({"bf16": True}, "`bf16` is True; it must be an object"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, r"`data_types\.grad_acum_dtype` is not a setting"),
        ({"steps_per_print": "auto"}, '`steps_per_print` is "auto", but the run has no value'),
        ({"zero_optimization": {}}, r"`zero_optimization\.stage` is not set; allowed: 3 .* 2"),
        ({"zero_optimization": 3}, "`zero_optimization` is 3; it must be an object"),
        (stage3(stage=1), r"`zero_optimization\.stage` is 1; allowed"),
        (stage3(stage=0), r"`zero_optimization\.stage` is 0; allowed"),
        (stage3(stage="auto"), r"`zero_optimization\.stage` is \"auto\""),
        (stage3(stage3_prefetch_bucket_sise=1), r"did you mean `zero_optimization\.stage3_prefetch_bucket_size`"),
        (
            stage3(overlap_com=True),
            r"`zero_optimization\.overlap_com` is not a setting; did you mean .*\.overlap_comm`",
        ),
        (stage3(offload_param={"devise": "cpu"}), r"offload_param\.devise` is not a setting; .*offload_param\.device`"),
        (stage3(offload_param={"device": "gpu"}), r"`zero_optimization\.offload_param\.device` is 'gpu'; it must be"),
        (stage3(reduce_bucket_size=0), r"`zero_optimization\.reduce_bucket_size` is 0; it must be greater than 0"),
        (stage3(reduce_bucket_size="auto"), r"`zero_optimization\.reduce_bucket_size` is \"auto\""),
        (stage3(zero_quantized_weights=True), "would round .* packed 4-bit codes"),
        (stage3(zero_quantized_nontrainable_weights=True), "would round .* packed 4-bit codes"),
        (stage3(stage3_use_all_reduce_for_fetch_params=True), "adding zeros to them, but .* packed 4-bit codes"),
        ({"torch_autocast": {"enabled": True}}, "would cast parameters .* packed 4-bit codes"),
        (stage3(zenflow={}), "an optimizer of its own"),
        (stage3(offload_param={"device": "nvme", "nvme_path": "/x"}), 'is "nvme", .* allowed: "cpu", "none"'),
        (stage3(cpu_offload=True), "replaced it by `offload_optimizer`"),
        (stage3(offload_optimizer={"device": "cpu"}), "zero_force_ds_cpu_optimizer"),
        (stage3(stage=2, stage3_max_live_parameters=1), "stage3_max_live_parameters` has no effect at stage 2"),
        (stage3(stage=2, leaf_module="auto"), "leaf_module` has no effect at stage 2"),
        (stage3(stage=2, offload_param={"device": "cpu"}), "offload_param` has no effect at stage 2"),
    ],
)
def test_bad_key_or_value_is_named_with_its_remedy(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    problems = problems_of(tmp_path, {**stage3(), **content})
    with pytest.raises(UserError, match=said):
        raise UserError(problems)
    assert len(problems) <= 2  # a block that is no object, a stage that is "auto": two sides of one mistake


@pytest.mark.parametrize("name", REFUSED_KEYS)
def test_refused_key_is_reported_once_with_the_reason(tmp_path: Path, name: str) -> None:
    """In a block where it is the only mistake, and whatever its value is."""
    *blocks, key = name.split(".")
    content = stage3()
    block = content
    for part in blocks:
        block = block.setdefault(part, {})
    block[key] = "auto"
    assert only_problem(tmp_path, content) == f"`{name}` is refused: {REFUSED_KEYS[name]}; remove it"


def test_refused_keys_of_zero_are_ones_that_deepspeed_reads() -> None:
    section = "zero_optimization."
    names = [name.removeprefix(section) for name in REFUSED_KEYS if name.startswith(section)]
    for *blocks, key in (name.split(".") for name in names):
        model: Any = DeepSpeedZeroConfig
        for block in blocks:
            model = section_type(model.model_fields[block].annotation)
        assert key in {*model.model_fields, *(field.alias for field in model.model_fields.values())}


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    content = {
        "optimizer": {},
        "scheduler": {},
        "gradient_clipping": 0.5,
        "train_batch_size": 1,
        "foo": 1,
        "zero_optimization": {"stage": 1, "overlap_com": True},
    }
    assert len(problems_of(tmp_path, content)) == 7


def test_hpz_group_must_divide_the_ranks(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(stage3(zero_hpz_partition_size=4)))
    for world_size in (1, 2, 3, 4, 12):  # fewer ranks than the group: DeepSpeed takes them all
        resolve_deepspeed(config_of(path, batch=24), world_size, "float32")
    with pytest.raises(UserError, match="is 4, which does not divide 6 ranks"):
        resolve_deepspeed(config_of(path, batch=24), 6, "float32")


@pytest.mark.parametrize(
    ("batch", "micro", "world_size", "said"),
    [
        (12, 4, 2, "with 2 ranks `train.micro_batch_size` may be 1, 2, 3, 6;"),
        (12, 4, 2, "with `train.micro_batch_size=4` the number of ranks may be 1, 3;"),
        (12, 4, 2, "set `train.global_batch_size` to 8 or 16"),
        (5, 2, 3, "set `train.global_batch_size` to 6"),
    ],
)
def test_batch_that_cannot_be_split_says_what_can(batch: int, micro: int, world_size: int, said: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_deepspeed(config_of("zero3.json", batch, micro), world_size, "float32")
    assert len(caught.value.problems) == 1
    assert f"`train.global_batch_size` is {batch}" in str(caught.value)
    assert said in str(caught.value)


def test_file_that_is_not_there_is_reported_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"did you mean `zero3\.json`"):
        resolve_deepspeed(config_of("zero33.json"), 1, "float32")
    with pytest.raises(UserError, match=r"allowed: .*zero2\.json, zero3\.json"):
        resolve_deepspeed(config_of("mine/xyz"), 1, "float32")


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not JSON"), ("[]", "must be a JSON object, not a list"), ("\xff", "JSON")]
)
def test_file_that_is_no_object_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=said):
        resolve_deepspeed(config_of(path), 1, "float32")


def test_duplicate_keys_are_refused_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "stage": 3}, "bf16": {}, "bf16": {}}')
    with pytest.raises(UserError) as caught:
        resolve_deepspeed(config_of(path), 1, "float32")
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "`stage` is set twice; keep one",
        "`bf16` is set twice; keep one",
    ]
