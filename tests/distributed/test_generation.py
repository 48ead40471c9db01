"""Answers while training, on 2 ranks: those of the merged model, at no cost to the training."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qvtune.convert.convert import convert
from tests.distributed.conftest import DROPOUT, FULL, ZERO2, Results
from tests.support.lab import MAX_STEPS, Job, Lab, make_lab

NEW_TOKENS = 9
GENERATE = {"rows": 5, "every": 2, "max_new_tokens": NEW_TOKENS, "batch_size": 2, "final_answer": "(.+)"}
VARIANTS: dict[str, dict[str, Any]] = {
    "zero3-nf4": DROPOUT,
    "zero3-none": {"model__quantization": "none"},
    "zero2-nf4": {**ZERO2, "train__best_metric": "exact_match", "train__save_every": 2},
    "dora": {"adapter__method": "dora"},
    "full": FULL,
    "ia3": {"adapter": {"method": "ia3", "projections": ["q", "v", "down"]}},
}
ALONE = {"prompts": "hello", "every": MAX_STEPS, "max_new_tokens": 3}
DURING_GENERATION = {
    "function": "qvtune.train.generate.generate_batch",
    "nth": 2 + 2,
    "number": signal.SIGTERM,
    "to": 1,
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("generation"))


@pytest.fixture(scope="module")
def results(lab: Lab) -> Iterator[Results]:
    def job(name: str, run: str, **changes: Any) -> Job:
        changes = {"data__eval": str(lab.folder / "eval.jsonl"), **changes}
        return {"name": name, "do": "train", "config": lab.config(run, **changes)}

    jobs = [
        job("without", "without", **DROPOUT),
        *(job(name, name, train__generate=GENERATE, **changes) for name, changes in VARIANTS.items()),
        {**job("stopped", "stopped", train__generate=GENERATE, **DROPOUT), "signal_at": DURING_GENERATION},
        job("resumed", "stopped", train__generate=GENERATE, **DROPOUT),
        job("alone", "alone", train__generate=ALONE),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVTUNE_CACHE", lab.environment["QVTUNE_CACHE"])
        ended = lab.launch("generation", 2, jobs)
        assert [end.code for end in ended] == [0, 0], "\n".join(end.output for end in ended)
        yield lab.results("generation", 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_answers_are_those_of_the_merged_model(lab: Lab, results: Results, tmp_path: Path, name: str) -> None:
    assert [result[name] for result in results] == [{"code": 0}] * 2
    events = lab.events(name, "generation")
    assert [event["step"] for event in events] == [0, 2, 4, MAX_STEPS]
    convert(lab.run_dir(name), tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "merged")
    answers = events[-1]["answers"]
    assert len(answers) == 5 and len({answer["answer"] for answer in answers}) > 2
    for answer in answers:
        ids = tokenizer(answer["prompt"], return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        assert answer["tokens"] == len(new)
        assert answer["answer"] == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert events[-1]["tokens"] == sum(answer["tokens"] for answer in answers)


def test_training_is_the_same_to_the_bit(lab: Lab, results: Results) -> None:
    """With dropout, hence with the same random numbers."""
    assert [result["without"] for result in results] == [{"code": 0}] * 2
    assert lab.losses("zero3-nf4") == lab.losses("without")
    assert lab.grad_norms("zero3-nf4") == lab.grad_norms("without")


def test_a_stop_in_a_generation_is_a_stop_after_its_step(lab: Lab, results: Results) -> None:
    """Exit code 75; the generation is run again as a whole, the evaluation before it is not."""
    assert [result["stopped"] for result in results] == [{"code": 75}] * 2
    assert [result["resumed"] for result in results] == [{"code": 0}] * 2
    assert [entry["step"] for entry in lab.events("stopped", "checkpoint")] == [2, MAX_STEPS]
    assert [entry["step"] for entry in lab.events("stopped", "generation")] == [0, 2, 4, MAX_STEPS]
    assert [entry["step"] for entry in lab.events("stopped", "eval")] == [0, MAX_STEPS]
    assert lab.losses("stopped") == lab.losses("without")


def test_the_best_checkpoint_may_be_that_of_the_best_answers(lab: Lab, results: Results) -> None:
    """Of equal ones the first: no answer of this model is right."""
    assert [result["zero2-nf4"] for result in results] == [{"code": 0}] * 2
    assert [event["exact_match"] for event in lab.events("zero2-nf4", "generation")] == [0.0] * 4
    assert (lab.run_dir("zero2-nf4") / "checkpoints" / "best").resolve().name == "step-00000002"


def test_a_rank_may_have_no_prompt(lab: Lab, results: Results) -> None:
    assert [result["alone"] for result in results] == [{"code": 0}] * 2
    events = lab.events("alone", "generation")
    assert [(event["step"], len(event["answers"])) for event in events] == [(0, 1), (MAX_STEPS, 1)]
    (answer,) = events[-1]["answers"]
    assert (answer["prompt"], answer["expected"]) == ("hello", None) and 1 <= answer["tokens"] <= 3
    assert "exact_match" not in events[-1]
