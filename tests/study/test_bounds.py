"""Theorem 1: counts and bounds against those worked out by hand, for published shapes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qvtune.config.load import dump_config
from qvtune.config.schema import RunConfig
from qvtune.errors import UserError
from qvtune.study.bounds import Bound, bounds
from qvtune.study.bounds_report import measured_gaps, print_bounds
from qvtune.study.counts import count_parameters, rank_for
from tests.plan.shapes import make_config_folder

ROWS = {"mnli": 392_702, "rte": 2_490}


def config(folder: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": str(folder.parent / "run"),
            "model": {"name_or_path": str(folder), "quantization": "none"},
            "train": {"max_steps": 1},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config_folder(tmp_path_factory.mktemp("roberta") / "model", "roberta_base")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config_folder(tmp_path_factory.mktemp("llama") / "model", "llama3_8b")


def classifier(folder: Path, labels: int = 2, **adapter: Any) -> RunConfig:
    sections = {"task": "sequence_classification", "classification": {"labels": list("abc")[:labels]}}
    return config(folder, adapter=adapter, **sections)


@pytest.mark.parametrize(
    ("adapter", "qv", "qkv"),
    [
        ({"method": "lora", "rank": 8}, 12 * 2 * 2 * 8 * 768, 12 * 3 * 2 * 8 * 768),
        ({"method": "dora", "rank": 16}, 12 * 2 * (2 * 16 * 768 + 768), 12 * 3 * (2 * 16 * 768 + 768)),
        ({"method": "full", "biases": True}, 12 * 2 * (768 * 768 + 768), 12 * 3 * (768 * 768 + 768)),
        ({"method": "full"}, 12 * 2 * 768 * 768, 12 * 3 * 768 * 768),
        ({"method": "bias"}, 12 * 2 * 768, 12 * 3 * 768),
        ({"method": "ia3"}, 12 * 2 * 768, 12 * 3 * 768),
    ],
)
def test_counts_of_an_encoder(roberta: Path, adapter: dict[str, Any], qv: int, qkv: int) -> None:
    """768 wide, 12 layers; its head is dense and out_proj, both with biases."""
    run = classifier(roberta, **adapter)
    found = {one.projections: one for one in bounds(run, 1000, 32)}
    assert {projections: one.parameters for projections, one in found.items()} == {("q", "v"): qv, ("q", "k", "v"): qkv}
    assert {one.head for one in found.values()} == {768 * 768 + 768 + 2 * 768 + 2}


@pytest.mark.parametrize(
    ("adapter", "q", "k", "v"),
    [
        ({"method": "lora", "rank": 8}, 2_097_152, 1_310_720, 1_310_720),
        ({"method": "dora", "rank": 8}, 2_097_152 + 131_072, 1_310_720 + 32_768, 1_310_720 + 32_768),
        ({"method": "full"}, 536_870_912, 134_217_728, 134_217_728),
    ],
)
def test_counts_with_grouped_query_attention(llama: Path, adapter: dict[str, Any], q: int, k: int, v: int) -> None:
    """Llama 3 8B: q is 4096 x 4096, k and v are 1024 x 4096; its head is a matrix of 4096 x classes."""
    counts = count_parameters(classifier(llama, labels=3, **adapter), ("q", "k", "v"))
    assert dict(counts.groups) == {"q": q, "k": k, "v": v, "head": 3 * 4096}
    assert counts.adapters == q + k + v
    assert count_parameters(config(llama, adapter=adapter)).groups == {"q": q, "v": v}, "no head"


@pytest.mark.parametrize(("task", "qv", "qkv"), [("mnli", 3.47, 4.25), ("rte", 43.5, 53.3)])
def test_both_forms_are_the_bound_of_table_2(roberta: Path, task: str, qv: float, qkv: float) -> None:
    """RoBERTa-base, LoRA of rank 8, 32 bits: far above 1, the range of the share of errors."""
    of_qv, of_qkv = bounds(classifier(roberta, rank=8), ROWS[task], 32)
    assert of_qv.paper == pytest.approx(of_qv.adapters_only, rel=1e-12) and of_qv.paper == pytest.approx(qv, rel=2e-3)
    assert of_qkv.paper == pytest.approx(of_qkv.adapters_only, rel=1e-12) and of_qkv.paper == pytest.approx(
        qkv, rel=2e-3
    )
    by_hand = math.sqrt(2 * 0.25 * 32 * (294_912 + 592_130) / ROWS[task])
    assert of_qv.with_head == pytest.approx(by_hand, rel=1e-12)
    halved = bounds(classifier(roberta, rank=8), ROWS[task], 16)[0]
    assert halved.adapters_only == pytest.approx(of_qv.adapters_only / math.sqrt(2))


@pytest.mark.parametrize(
    ("adapter", "ratio"), [({"rank": 8}, 0.850), ({"method": "full"}, 0.913)], ids=["lora", "full"]
)
def test_the_papers_form_is_not_defined_where_shapes_differ(llama: Path, adapter: Any, ratio: float) -> None:
    of_qv, of_qkv = bounds(config(llama, adapter=adapter), 1000, 32)
    assert of_qv.paper is None and of_qkv.paper is None
    assert of_qv.adapters_only / of_qkv.adapters_only == pytest.approx(ratio, abs=5e-4)


def test_the_recipes_own_projections_come_first(roberta: Path) -> None:
    found = bounds(classifier(roberta, projections=["v", "o"]), 1000, 32)
    assert [one.projections for one in found] == [("v", "o"), ("q", "v"), ("q", "k", "v")]
    assert isinstance(found[0], Bound) and found[0].paper is None


def test_vacuous_is_said_only_where_it_is(roberta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = classifier(roberta, method="bias")
    print_bounds(run, 10_000, 32, None)  # 18,432 and 27,648 parameters: sqrt(16 P / N) is 5.43 and 6.65
    shown = capsys.readouterr().out
    assert "5.43 vacuous" in shown and "6.65 vacuous" in shown and "Ratio QV / QKV of the bounds 0.816" in shown
    assert "not below the range of the loss" in shown and "the share of wrong classes" in shown
    print_bounds(run, 10**9, 32, None)
    shown = capsys.readouterr().out
    assert "0.0172" in shown and "0.021" in shown and "vacuous:" not in shown and " vacuous " not in shown


def test_rows_are_counted(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": "what", "completion": " it does"}) + "\n") * 1234)
    print_bounds(config(llama, data={"train": str(rows)}), None, 32, None)
    assert "N = 1,234 training rows" in capsys.readouterr().out
    print_bounds(config(llama, data={"train": {"path": str(rows), "max_rows": 56}}), None, 32, None)
    assert "N = 56 training rows" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data.train: .*none.jsonl"):
        print_bounds(config(llama, data={"train": str(tmp_path / "none.jsonl")}), None, 32, None)


@pytest.mark.parametrize(
    ("method", "projections", "parameters", "rank"),
    [
        ("lora", "qv", 3_407_872, 8),
        ("lora", "qkv", 3_407_872, 6),  # 589,824 per rank: 5.8
        ("lora", "v", 3_407_872, 21),  # 163,840 per rank: 20.8
        ("dora", "qv", 3_571_712, 8),  # and a magnitude for each output
        ("lora", "q", 200_000, 1),  # 262,144 per rank
    ],
)
def test_the_rank_of_a_parameter_count(llama: Path, method: str, projections: str, parameters: int, rank: int) -> None:
    """Of Llama-3.1-8B, with grouped-query attention; the head does not count."""
    assert rank_for(classifier(llama, method=method, projections=list(projections)), parameters) == rank


def test_a_parameter_count_below_that_of_rank_1_is_refused(llama: Path) -> None:
    with pytest.raises(UserError, match=r"parameters 100,000: projections q have 262,144 at rank 1; give more"):
        rank_for(classifier(llama, projections=["q"]), 100_000)


def record(run: RunConfig, *events: dict[str, Any]) -> Path:
    run_dir = Path(run.run_dir)
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(dump_config(run))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run_dir


def steps(*losses: tuple[float, int]) -> list[dict[str, Any]]:
    return [
        {"event": "step", "step": number, "loss": loss, "label_tokens": labels}
        for number, (loss, labels) in enumerate(losses, start=1)
    ]


def test_the_measured_gap_is_that_of_the_last_steps_weighted_by_labels(llama: Path) -> None:
    run = config(llama)
    run_dir = record(
        run,
        {"event": "eval", "step": 0, "loss": 3.0},
        *steps(*[(9.0, 1)] * 18, (1.0, 30), (0.5, 10)),
        {"event": "eval", "step": 20, "loss": 1.5},
    )
    title, gap, advice = measured_gaps(run, run_dir)
    assert title.endswith("after step 20:") and "mean over the last 2 steps" in gap
    assert "training 0.875, eval 1.5, difference +0.625" in gap
    assert "data.eval='{train: ..., test: ...}'" in advice


def test_a_set_called_train_gives_the_gap_of_the_trained_model(llama: Path) -> None:
    run = config(llama)
    sets = {"train": {"loss": 0.2, "accuracy": 0.95}, "test": {"loss": 0.5, "accuracy": 0.85}}
    run_dir = record(run, *steps((9.0, 1)), {"event": "eval", "step": 1, "loss": 0.2, "sets": sets})
    lines = measured_gaps(run, run_dir)
    assert len(lines) == 3
    assert "loss: training 0.2, test 0.5, difference +0.3" in lines[1]
    assert "accuracy: training 0.95, test 0.85, difference -0.1" in lines[2]


def test_a_run_of_other_settings_is_refused(llama: Path, tmp_path: Path) -> None:
    run_dir = record(config(llama), {"event": "eval", "step": 0, "loss": 3.0})
    with pytest.raises(UserError) as caught:
        measured_gaps(config(llama, adapter={"rank": 4}, data={"train": "mine.jsonl"}), run_dir)
    assert [problem.split(": ")[2].split(" is ")[0] for problem in caught.value.problems] == [
        "data.train",
        "adapter.rank",
    ]
    with pytest.raises(UserError, match=r"--run: .* no evaluation after a step of training"):
        measured_gaps(config(llama), run_dir)
    with pytest.raises(UserError, match=r"--run: .* is no run folder \(no metrics.jsonl\)"):
        measured_gaps(config(llama), tmp_path)
