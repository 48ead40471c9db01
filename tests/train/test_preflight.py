"""What is refused before anything is loaded or written: everything that is wrong, in one message."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist

from qvtune.config.load import dump_config, load_config
from qvtune.config.schema import RunConfig
from qvtune.distributed.stop import StopRequest
from qvtune.errors import UserError
from qvtune.storage.files import write_json
from qvtune.storage.paths import cache_dir
from qvtune.train.preflight import find_problems, preflight
from qvtune.train.prepare import prepare
from tests.support.tiny import ENCODERS, make_model_folder
from tests.train.test_run_folder import write_checkpoint

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config(tmp_path: Path, llama_folder: Path) -> MakeConfig:
    """A run that can start, in ``tmp_path``; ``changes`` are written ``section__key=value``."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "what", "completion": " it does"}) + "\n")

    def make(**changes: Any) -> RunConfig:
        config: dict[str, Any] = {
            "model": {"name_or_path": str(llama_folder)},
            "optimizer": {},
            "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32},
            "train": {"max_steps": 1, "global_batch_size": 2},
            "run_dir": str(tmp_path / "run"),
        }
        for path, value in changes.items():
            section, _, key = path.rpartition("__")
            (config[section] if section else config)[key] = value
        return RunConfig.model_validate(config)

    return make


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("family", ENCODERS)
def test_a_language_model_is_no_encoder(tmp_path: Path, make_config: MakeConfig, family: str) -> None:
    folder = make_model_folder(tmp_path / family, family)
    with pytest.raises(
        UserError, match=r"task: causal_lm .* is an encoder.*llama.*gemma3_text\) in model\.name_or_path"
    ):
        prepare(make_config(model__name_or_path=str(folder)), StopRequest())
    assert not (tmp_path / "run").exists()


@pytest.fixture
def make_classifier(tmp_path: Path, make_config: MakeConfig) -> MakeConfig:
    """The same run as a classifier: BERT, six texts with the labels 0, 9 and 10."""
    folder = make_model_folder(tmp_path / "bert", "bert")

    def make(labels: Sequence[object] = (9, 10, 0, 9, 10, 0), **changes: Any) -> RunConfig:
        rows = [json.dumps({"text": f"hello {index}", "label": label}) for index, label in enumerate(labels)]
        (tmp_path / "labels.jsonl").write_text("\n".join(rows) + "\n")
        settings = {
            "task": "sequence_classification",
            "model__name_or_path": str(folder),
            "data__train": str(tmp_path / "labels.jsonl"),
        }
        return make_config(**settings | changes)

    return make


@pytest.mark.usefixtures("one_rank")
def test_the_labels_are_those_of_the_training_rows(make_classifier: MakeConfig) -> None:
    plan = preflight(make_classifier(), 1)
    assert plan.config.classification.labels == ("0", "9", "10"), "as numbers"
    row = plan.rows[0]
    starts = row.document_lengths.cumsum() - row.document_lengths
    assert sorted(row.labels[starts].tolist()) == [0, 0, 1, 1, 2, 2]
    named = preflight(make_classifier(classification={"labels": ["10", "9", "0"]}), 1)
    assert named.config.classification.labels == ("10", "9", "0")
    assert named.task.label_of(named.rows[0], 0) == plan.task.label_of(row, 0)
    assert named.rows[0].labels[0] == 2 - row.labels[0]


@pytest.mark.usefixtures("one_rank")
def test_what_cannot_be_classified_is_one_message(make_classifier: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"text": "hello", "label": 9}\n{"text": "hello", "label": "nine"}\n')
    config = make_classifier(
        data__eval=str(tmp_path / "eval.jsonl"),
        data__max_length=300,
        optimizer__lr_multipliers={"k": 2.0, "head": 3.0},
    )
    with pytest.raises(UserError) as caught:
        preflight(config, 1)
    text = str(caught.value)
    assert "data.max_length: 300 is more than the 256 positions of the model" in text
    assert f"{tmp_path / 'eval.jsonl'}:2: the label 'nine' is none of the 3 labels of the run (0, 9, 10)" in text
    assert "'k' decides for no trained parameter" in text and "trained groups (adapter.projections): head, q, v" in text
    assert "'head' decides" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("labels", "problem", "message"),
    [
        (["a", "a"], "single_label", "data.train: the training rows have 1 different labels (a"),
        ([1.5, "high"], "regression", "labels.jsonl:2: the label 'high' is no number"),
    ],
)
def test_labels_that_do_not_fit_the_problem(
    make_classifier: MakeConfig, labels: list[object], problem: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        preflight(make_classifier(labels, classification={"problem": problem}), 1)
    assert message in str(caught.value)


@pytest.mark.usefixtures("one_rank")
def test_a_task_of_glue_is_recognised_and_known(make_classifier: MakeConfig, tmp_path: Path) -> None:
    """MRPC's file as it is published: the labels in GLUE's order, not sorted; written down as resolved."""
    (tmp_path / "mrpc.tsv").write_text(
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\t"hello\tworld\n0\t7\t8\thello\tworld\n',
        encoding="utf-8-sig",
    )
    plan = preflight(make_classifier(data__train=str(tmp_path / "mrpc.tsv")), 1)
    assert plan.config.classification.labels == ("not_equivalent", "equivalent")
    assert sorted(plan.task.label_of(plan.rows[0], number) or "" for number in (0, 1)) == [
        "equivalent",
        "not_equivalent",
    ]
    (tmp_path / "recipe.yaml").write_text(dump_config(plan.config))
    again = preflight(load_config(tmp_path / "recipe.yaml"), 1)
    assert again.config == plan.config and again.data_statistics == plan.data_statistics
    (tmp_path / "scores.jsonl").write_text('{"sentence1": "hello", "sentence2": "world", "label": 2.5}')
    scores = {"path": str(tmp_path / "scores.jsonl"), "glue": "stsb"}
    named = preflight(make_classifier(data__train=scores, data__eval={"here": scores}), 1)
    assert named.task.metric == "pearson" and named.config.classification.problem == "regression"
    assert list(named.eval_sets) == ["here"]


@pytest.mark.usefixtures("one_rank")
def test_settings_that_a_task_of_glue_does_not_have(make_classifier: MakeConfig, tmp_path: Path) -> None:
    """Beside what else is wrong."""
    config = make_classifier(
        data__train={"path": str(tmp_path / "labels.jsonl"), "glue": "stsb"},
        data__max_length=300,
        classification={"metric": "f1"},
    )
    with pytest.raises(UserError) as caught:
        preflight(config, 1)
    assert "must have with problem: regression one of the metrics auto, loss, pearson, spearman" in str(caught.value)
    assert "more than the 256 positions" in str(caught.value)


def test_a_classifier_is_checked_before_it_is_submitted(make_classifier: MakeConfig) -> None:
    """Without all rows having been read, hence without the labels."""
    assert find_problems(make_classifier(), 2, on_gpus=False) == []
    (problem,) = find_problems(make_classifier(data__max_length=300), 2, on_gpus=False)
    assert "more than the 256 positions" in problem


def all_wrong(make_config: MakeConfig, tmp_path: Path) -> RunConfig:
    """Settings, model and data: a problem of each kind, and two of some."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "what"\n')
    return make_config(
        deepspeed="zero9.json",
        model__attention="flash_attention_2",
        optimizer__lr_multipliers={"k": 2.0},
        checkpoint={"resume": "always"},
        data__eval=str(tmp_path / "none.jsonl"),
        train__generate={"file": "none.txt"},
    )


EXPECTED = (
    "`deepspeed` is 'zero9.json'",
    "checkpoint.resume: always",
    "optimizer.lr_multipliers: 'k' decides for no trained parameter",
    "rows.jsonl:1: not JSON",
    "data.eval: cannot read",
    "train.generate.file: none.txt: cannot be read",
)


def test_all_problems_of_settings_model_and_data_are_one_message(tmp_path: Path, make_config: MakeConfig) -> None:
    """For a run on this machine: its devices are looked at as well."""
    if torch.cuda.is_available():
        pytest.skip("flash attention may run on a machine with a GPU; run on one without")
    with pytest.raises(UserError) as raised:
        preflight(all_wrong(make_config, tmp_path), world_size=1)
    expected = (*EXPECTED, "flash_attention_2 needs a CUDA device")
    assert [part for part in expected if not any(part in problem for problem in raised.value.problems)] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("stage", "is_gathered"), [("zero3.json", True), ("zero2.json", False)])
def test_a_base_that_does_not_fit_whole_generates_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, stage: str, is_gathered: bool
) -> None:
    """Where it is sharded; with ZeRO-2 it is whole already."""
    monkeypatch.setattr("qvtune.train.preflight.free_on_device", lambda: 100_000)
    config = make_config(train__generate={"prompts": ["what"]}, deepspeed=stage)
    if is_gathered:
        with pytest.raises(UserError, match=r"train\.generate: each rank gathers the base \(0\.00 GB\).* are free for"):
            preflight(config, world_size=2)
    else:
        assert [prompt.text for prompt in preflight(config, world_size=2).prompts] == ["what"]


def test_a_weighted_mixture_and_named_evaluation_sets(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each source is in the plan with its share; an epoch has as many rows as all sources together."""
    rows = [{"prompt": f"what {index}", "completion": " it does"} for index in range(12)]
    for name, size in (("a", 12), ("b", 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:size]))
    data = {
        "train": [{"path": str(tmp_path / "a.jsonl"), "weight": 1}, {"path": str(tmp_path / "b.jsonl"), "weight": 3}],
        "eval": {"first": str(tmp_path / "b.jsonl"), "second": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]},
        "packing": False,
        "max_length": 32,
    }
    config = make_config(data=data, train={"epochs": 2, "global_batch_size": 4})
    plan = preflight(config, world_size=1, on_gpus=False)
    assert (plan.max_steps, len(plan.rows)) == (8, 15)
    visited = [row for step in range(plan.max_steps) for row in plan.order.of_step(step, 4).tolist()]
    assert sum(row >= 12 for row in visited) == 24
    assert {name: len(one) for name, one in plan.eval_sets.items()} == {"first": 3, "second": 15}
    found = plan.data_statistics
    assert list(found) == ["data.train", "data.eval.first", "data.eval.second"]
    assert [(one["weight"], one["rows"], one["passes"]) for one in found["data.train"]["sources"]] == [
        (1, 12, 8 / 12),
        (3, 3, 24 / 3),
    ]
    assert json.loads(json.dumps(found)) == found
    lines = capsys.readouterr().out.splitlines()
    assert f"data.train:   {tmp_path / 'b.jsonl'}: 3 rows, weight 3, 8.00 passes" in lines
    assert f"data.eval.second:   {tmp_path / 'a.jsonl'}: 12 rows" in lines


def test_bad_rows_of_all_sources_are_one_message(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "bad.jsonl").write_text("x\n")
    (tmp_path / "worse.jsonl").write_text("y\n")
    good, bad, worse = (str(tmp_path / f"{name}.jsonl") for name in ("rows", "bad", "worse"))
    config = make_config(data={"train": [bad, good], "eval": {"one": good, "two": worse}})
    with pytest.raises(UserError) as raised:
        preflight(config, world_size=1, on_gpus=False)
    named = [problem for problem in raised.value.problems if "not JSON" in problem]
    assert [problem.partition(":1:")[0] for problem in named] == [f"data.train: {bad}", f"data.eval.two: {worse}"]
    assert [problem for problem in find_problems(config, world_size=1) if "not JSON" in problem] == named


@pytest.mark.parametrize("on_gpus", [True, False])
def test_for_another_machine_its_devices_are_not_looked_at(
    tmp_path: Path, make_config: MakeConfig, on_gpus: bool
) -> None:
    with pytest.raises(UserError) as raised:
        preflight(all_wrong(make_config, tmp_path), world_size=1, on_gpus=on_gpus)
    assert [part for part in EXPECTED if not any(part in problem for problem in raised.value.problems)] == []
    assert "flash_attention_2" not in str(raised.value)


def test_rows_are_checked_where_the_model_is_not_there(tmp_path: Path, make_config: MakeConfig) -> None:
    config = all_wrong(make_config, tmp_path).model_copy(
        update={"model": make_config().model.model_copy(update={"name_or_path": str(tmp_path / "nothing")})}
    )
    with pytest.raises(UserError) as raised:
        preflight(config, world_size=1, on_gpus=False)
    expected = ("model.name_or_path: ", "rows.jsonl:1: not JSON", "data.eval: cannot read")
    assert [part for part in expected if not any(part in problem for problem in raised.value.problems)] == []


def test_a_run_that_can_start_is_planned(make_config: MakeConfig) -> None:
    plan = preflight(make_config(), world_size=2, on_gpus=True)
    assert (plan.task.name, plan.dtype, plan.max_steps, len(plan.rows)) == ("causal_lm", torch.bfloat16, 1, 1)
    assert plan.deepspeed_config["gradient_accumulation_steps"] == 1
    assert plan.deepspeed_config["zero_optimization"]["stage3_max_live_parameters"] > 0


@pytest.mark.parametrize("value", ["1", "t", "TRUE", "y", "Yes", "2", ""])
def test_a_search_for_nan_in_gathered_codes_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Also what torch itself does not take."""
    monkeypatch.setenv("TORCH_NCCL_NAN_CHECK", value)
    (problem,) = find_problems(make_config(), world_size=1, on_gpus=True)
    assert all(part in problem for part in (f"TORCH_NCCL_NAN_CHECK is {value!r}", "unset it", "slurm/cluster.env"))


@pytest.mark.parametrize("value", ["0", "f", "False", "n", "NO"])
def test_no_search_for_nan_is_no_problem(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TORCH_NCCL_NAN_CHECK", value)
    assert find_problems(make_config(), world_size=1, on_gpus=True) == []


@pytest.mark.parametrize("changes", [{"deepspeed": "zero2.json"}, {"model__quantization": "none"}])
def test_a_search_for_nan_where_no_codes_are_gathered_is_no_problem(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    monkeypatch.setenv("TORCH_NCCL_NAN_CHECK", "1")
    assert find_problems(make_config(**changes), world_size=1, on_gpus=True) == []


def test_the_hub_is_not_asked_for_first_rows(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    data = {**make_config().data.model_dump(), "train": {"path": "owner/sums", "split": "train"}}
    assert find_problems(make_config(data=data), world_size=1, on_gpus=True) == []


def test_a_run_is_resumed_on_the_rows_that_it_was_started_with(tmp_path: Path, make_config: MakeConfig) -> None:
    """Even where every number of the data set is the same: the tokens are others."""
    config = make_config()
    plan = preflight(config, world_size=1, on_gpus=True)
    write_checkpoint(config, step=1)
    write_json(Path(config.run_dir) / "data.json", plan.data_statistics)
    resumed = preflight(config, world_size=1, on_gpus=True)
    assert resumed.resume is not None and resumed.data_statistics == plan.data_statistics
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "what", "completion": " does it"}) + "\n")
    with pytest.raises(UserError, match=r"^data\.train: not the rows .* \(crc32 \w{8}, was \w{8}\): set it back"):
        preflight(config, world_size=1, on_gpus=True)


def test_problems_are_found_without_tokenizing(tmp_path: Path, make_config: MakeConfig) -> None:
    before = set(cache_dir().rglob("*"))
    assert find_problems(make_config(), world_size=1, on_gpus=False) == []
    found = find_problems(all_wrong(make_config, tmp_path), world_size=1, on_gpus=False)
    assert [part for part in EXPECTED if not any(part in problem for problem in found)] == []
    assert set(cache_dir().rglob("*")) == before


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is a folder without config.json"),
        (with_config(model_type="gpt2"), "model_type is 'gpt2'; supported"),
        (with_config(quantization_config={"quant_method": "gptq"}), "quantized by 'gptq'"),
        (with_config(num_key_value_heads=4), "config.json and the weights do not belong together"),
        (with_config(head_dim=15), "even rotary dimension"),
        (with_config(hidden_act="no_such"), "cannot build the model: KeyError: 'no_such'"),
        (without_weights, "no weights; expected model.safetensors"),
    ],
)
def test_what_is_wrong_with_the_base_names_its_setting(
    tmp_path: Path, make_config: MakeConfig, damage: Callable[[Path], None], problem: str
) -> None:
    folder = make_model_folder(tmp_path / "base")
    damage(folder)
    problems = find_problems(make_config(model__name_or_path=str(folder)), 1)
    assert any(problem in found for found in problems), problems
    assert all(found.startswith("model.name_or_path: ") for found in problems), problems


def test_a_model_whose_forward_fails_is_refused_before_it_is_read(tmp_path: Path, make_config: MakeConfig) -> None:
    """4 heads and 3 of keys and values: the weights fit the configuration, and attention cannot use them."""
    folder = make_model_folder(tmp_path / "base", num_key_value_heads=3)
    (found,) = find_problems(make_config(model__name_or_path=str(folder)), 1)
    assert found.startswith(f"model.name_or_path: {folder}/config.json: transformers cannot run its forward: Runtime")
    assert "The model itself fails (llama), without training" in found


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_tracker_without_its_package_is_found_with_all_other_problems(make_config: MakeConfig) -> None:
    problems = find_problems(
        make_config(report={"trackers": ["wandb"]}, deepspeed="no_such.json"), world_size=1, on_gpus=False
    )
    assert len(problems) == 2 and any("report.trackers: wandb" in one for one in problems)
