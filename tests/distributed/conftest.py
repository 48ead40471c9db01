"""The launches, each made once: a start costs ten seconds a process, a job less than one."""

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qvtune.checkpoint.folder import step_folder
from qvtune.model.quantize import quantize
from qvtune.versions import repository
from tests.distributed.worker import LEAKING
from tests.support.lab import Job, Lab, add_encoders, change_one_weight, classifier, flip_a_bit, make_lab, poison
from tests.support.varlen_attention import VARLEN

Results = list[dict[str, Any]]  # of each rank: name of the job -> what it returned

# Runs on 2 ranks that differ from "plain" by rounding alone -> what they change.
EQUIVALENT: dict[str, dict[str, Any]] = {
    "micro_batch": {"train__micro_batch_size": 3},
    "activation_checkpointing": {"train__activation_checkpointing": True},
    "sdpa": {"model__attention": "sdpa"},  # elsewhere it is what `auto` takes on a CPU, varlen
    "zero2": {"deepspeed": "zero2.json"},
    "zero3_offload": {"deepspeed": "zero3_offload.json"},
}
DROPOUT = {"adapter__dropout": 0.1}
ZERO2 = {"deepspeed": "zero2.json"}
STOP = {"train__stop_after_step": 3}
FULL = {"adapter": {"method": "full", "projections": ["q", "v"]}}
# Runs of "plain" that are asked to stop before the nth call of a function; what they change; the step they stop after.
# A step has three micro-batches.
MIDDLE_OF_STEP_3 = {"function": "qvtune.train.loop.train_on", "nth": 2 * 3 + 2, "number": signal.SIGTERM, "to": 1}
EVALUATION = {"function": "qvtune.train.loop.evaluate_sets", "number": signal.SIGINT}
TERMINATED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "terminated": (MIDDLE_OF_STEP_3, {}, 2),
    "terminated-zero2": (MIDDLE_OF_STEP_3, ZERO2, 2),
    "terminated-dropout": (MIDDLE_OF_STEP_3, DROPOUT, 2),
    "terminated-at-once": ({**EVALUATION, "nth": 1}, {}, 0),
    "terminated-evaluation": ({**EVALUATION, "nth": 2}, {}, 2),
}
# Asked before the run folder is opened; rows that no earlier run has tokenized.
UNSEEN_ROWS = {"data__loss_on": "all"}
TERMINATED_EARLY = {
    "terminated-tokenizing": {"function": "qvtune.tasks.causal_lm.tokenize_rows", "nth": 1},
    "terminated-loading": {"function": "qvtune.model.loader._fill_quantized", "nth": 3},
}


# At this rate nothing becomes better.
EARLY = {"optimizer__lr": 1e-12, "train__eval_every": 1, "train__early_stopping": 2}


def mixture(lab: Lab, *weights: float) -> dict[str, Any]:
    """Three sources, and two sets for evaluation."""
    train, few = str(lab.folder / "train.jsonl"), str(lab.folder / "eval.jsonl")
    sources = [{"path": train}, {"path": few}, {"path": train, "max_rows": 20}]
    return {
        "data__train": [{**source, "weight": weight} for source, weight in zip(sources, weights, strict=True)],
        "data__eval": {"few": few, "both": [train, few]},
        "train__eval_rows": True,
    }


class Classifier(NamedTuple):
    """Runs of a classifier: family of the model, kind of labels, more changes, and the launches with such a run."""

    family: str
    kind: str
    changes: dict[str, Any]
    launches: tuple[str, ...]


CLASSIFIERS = {
    "bert": Classifier("bert", "classes", {}, ("on-one", "on-two", "on-three")),
    "bert-padded": Classifier("bert", "classes", {"data__packing": False}, ("on-three",)),
    "roberta": Classifier("roberta", "classes", {"model__quantization": "none"}, ("on-two",)),
    "roberta-scores": Classifier("roberta", "scores", {}, ("on-two", "on-three")),
    "llama-classes": Classifier("model", "classes", {}, ("on-two", "on-three")),
}

# Copies of stopped runs, which continue on as many ranks as the name says -> the run, and its changes.
SHARES = {
    f"shares-{kind}-{num_ranks}": (f"stopped{suffix}", changes)
    for num_ranks in (2, 3)
    for kind, suffix, changes in (
        ("lora", "", {}),
        ("full", "-full", FULL),
        ("full-zero2", "-full-zero2", {**FULL, **ZERO2}),
    )
}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = make_lab(tmp_path_factory.mktemp("distributed"))
    poison(lab)
    add_encoders(lab)
    quantize(lab.folder / "model", lab.folder / "nf4")
    shutil.copytree(lab.folder / "model", lab.folder / "other")
    for num_ranks in (2, 3):  # which are one node
        hpz = json.loads((repository() / "ds_configs" / "zero3_hpz.json").read_text())
        hpz["zero_optimization"]["zero_hpz_partition_size"] = num_ranks
        hpz_json(lab, num_ranks).write_text(json.dumps(hpz))
    return lab


def hpz_json(lab: Lab, num_ranks: int) -> Path:
    """The DeepSpeed configuration with hpZ on one node of so many ranks."""
    return lab.folder / f"zero3_hpz_{num_ranks}.json"


@pytest.fixture(scope="session")
def one(lab: Lab) -> Results:
    """1 rank."""
    jobs = [
        base(lab, "one-base"),
        base(lab, "one-unquantized", model__quantization="none"),
        train(lab, "one"),
        train(lab, "one-micro_batch", train__micro_batch_size=2),
        _evaluated(lab, "not-at-start", train__eval_at_start=False),
        train(lab, "full-on-one", **FULL),
        train(lab, "mixture-on-one", **mixture(lab, 0.5, 0.3, 0.2)),
        *_classifiers(lab, "on-one"),
    ]
    return launch(lab, "one", 1, jobs)


@pytest.fixture(scope="session")
def two(lab: Lab) -> Results:
    """2 ranks; the last job kills them with signal 9."""
    jobs = [
        base(lab, "two-base"),
        base(lab, "two-unquantized", model__quantization="none"),
        _evaluated(lab, "plain"),
        train(lab, "auto", deepspeed="auto"),
        *(train(lab, name, **changes) for name, changes in EQUIVALENT.items()),
        train(lab, "zero3_hpz", deepspeed=str(hpz_json(lab, 2))),
        {**train(lab, "varlen"), "attention": VARLEN},
        {**train(lab, "leaking"), "attention": LEAKING, "error": "RuntimeError"},
        train(lab, "rates", **_rates()),
        {**train(lab, "rare", **_rare(lab)), "error": "RuntimeError", "unchecked_base": True},
        {**train(lab, "poisoned", model__name_or_path=str(lab.folder / "poisoned")), "error": "UserError"},
        train(lab, "nf4_folder", model__name_or_path=str(lab.folder / "nf4")),
        train(lab, "other_base", model__name_or_path=str(lab.folder / "other"), **STOP),
        train(lab, "dropout", **DROPOUT),
        train(lab, "stopped", **STOP),
        train(lab, "stopped-dropout", **STOP, **DROPOUT),
        train(lab, "stopped-zero2", **STOP, **ZERO2),
        *({**_evaluated(lab, name, **changes), "signal_at": when} for name, (when, changes, _) in TERMINATED.items()),
        *(
            {
                **train(lab, name, **UNSEEN_ROWS),
                "signal_at": {**when, "number": signal.SIGUSR1, "to": 1},
                "error": "StopRequested",
            }
            for name, when in TERMINATED_EARLY.items()
        ),
        train(lab, "mixture", **mixture(lab, 0.5, 0.3, 0.2)),
        train(lab, "mixture-stopped", **mixture(lab, 0.5, 0.3, 0.2), **STOP),
        _evaluated(lab, "full", **FULL),
        train(lab, "full-zero2", **FULL, **ZERO2),
        train(lab, "full-unquantized", **FULL, model__quantization="none"),
        train(lab, "stopped-full", **FULL, **STOP),
        train(lab, "stopped-full-zero2", **FULL, **ZERO2, **STOP),
        *_classifiers(lab, "on-two"),
        _classifier(lab, "bert", "zero2", **ZERO2),
        _classifier(lab, "bert", "full", **FULL),
        _classifier(lab, "bert", "stopped", **STOP),
        _classifier(lab, "bert", "early", **EARLY, train__stop_after_step=1),
        {
            **_killed(lab),  # as step 5 begins
            "signal_at": {"function": "qvtune.train.loop._set_learning_rates", "nth": 5, "number": signal.SIGKILL},
        },
    ]
    results = launch(lab, "two", 2, jobs, unfinished=["killed"])
    change_one_weight(lab.folder / "other" / "model.safetensors")
    damaged_copy(lab.run_dir("killed") / "checkpoints", step=3)
    for copy in ("refused", "stopped-on-three", "stopped-then-zero2"):
        lab.copy_run("stopped", copy)
    lab.copy_run("bert-stopped", "bert-stopped-on-three")
    for copy, (run, _) in SHARES.items():
        lab.copy_run(run, copy)
    return results


@pytest.fixture(scope="session")
def two_later(lab: Lab, two: Results) -> Results:
    """2 ranks in new processes, where the stopped and the killed runs go on."""
    jobs = [
        train(lab, "again"),
        {**train(lab, "refused", optimizer__lr=1.0, adapter__projections=["q", "v", "o"]), "error": "UserError"},
        {**train(lab, "other_base", model__name_or_path=str(lab.folder / "other")), "error": "UserError"},
        train(lab, "stopped"),
        train(lab, "stopped-dropout", **DROPOUT),
        train(lab, "stopped-zero2", **ZERO2),
        train(lab, "stopped-then-zero2", **ZERO2),
        *(_evaluated(lab, name, **changes) for name, (_, changes, _) in TERMINATED.items()),
        *(train(lab, name, **UNSEEN_ROWS) for name in TERMINATED_EARLY),
        {**train(lab, "mixture-stopped", **mixture(lab, 0.5, 0.2, 0.3)), "error": "UserError"},
        {**train(lab, "mixture-stopped", **mixture(lab, 0.5, 0.3, 0.2)), "name": "mixture-continued"},
        train(lab, "stopped-full", **FULL),
        _classifier(lab, "bert", "stopped"),
        _classifier(lab, "bert", "early", **EARLY),
        _killed(lab),
        *_shares(lab, 2),
    ]
    return launch(lab, "two_later", 2, jobs)


@pytest.fixture(scope="session")
def three(lab: Lab, two: Results) -> Results:
    """3 ranks, among which nothing divides evenly."""
    jobs = [
        base(lab, "three-base"),
        base(lab, "three-unquantized", model__quantization="none"),
        train(lab, "three"),
        train(lab, "stopped-on-three"),
        train(lab, "full-on-three", **FULL),
        train(lab, "mixture-on-three", **mixture(lab, 0.5, 0.3, 0.2)),
        *_classifiers(lab, "on-three"),
        _classifier(lab, "bert", "stopped-on-three"),
        *_shares(lab, 3),
    ]
    return launch(lab, "three", 3, jobs)


def damaged_copy(checkpoints: Path, step: int) -> None:
    """A checkpoint of the next step, with one bit of the moments changed."""
    newer = shutil.copytree(step_folder(checkpoints, step), step_folder(checkpoints, step + 1))
    flip_a_bit(newer / "optimizer.safetensors")


def base(lab: Lab, name: str, **changes: Any) -> Job:
    return {"name": name, "do": "base", "config": lab.config(name, **changes)}


def train(lab: Lab, name: str, **changes: Any) -> Job:
    return {"name": name, "do": "train", "config": lab.config(name, **changes)}


def _shares(lab: Lab, num_ranks: int) -> list[Job]:
    jobs = [(name, changes) for name, (_, changes) in SHARES.items() if name.endswith(str(num_ranks))]
    return [{"name": name, "do": "shares", "config": lab.config(name, **changes)} for name, changes in jobs]


def _evaluated(lab: Lab, name: str, **changes: Any) -> Job:
    return train(lab, name, data__eval=str(lab.folder / "eval.jsonl"), train__eval_every=2, **changes)


def _classifiers(lab: Lab, suffix: str) -> list[Job]:
    return [_classifier(lab, name, suffix) for name, one in CLASSIFIERS.items() if suffix in one.launches]


def _classifier(lab: Lab, name: str, suffix: str, **more: Any) -> Job:
    family, kind, changes, _ = CLASSIFIERS[name]
    rows = {"train__eval_rows": True}
    return train(lab, f"{name}-{suffix}", **classifier(lab, family, kind), **rows, **changes, **more)


def _killed(lab: Lab) -> Job:
    """A classifier: its head and the head's moments are in its checkpoints, beside those of the adapter."""
    every = {"train__save_every": 3, "train__eval_every": 1, "train__eval_rows": True}
    return train(lab, "killed", **classifier(lab, "bert"), **every)


def _rates() -> dict[str, Any]:
    """Three multipliers and a group without one; the full rate from the first step, and an eps of nothing."""
    return {
        "adapter__projections": ["q", "k", "v"],
        "optimizer__lr_multipliers": {r"layers\.0\..*\.v_proj": 8.0, "v": 4.0, "k": 0.5},
        "optimizer__eps": 1e-12,
        "schedule__warmup_ratio": 0.0,
        "schedule__name": "constant",
        "train__max_steps": 2,
        "train__save_every": 1,
    }


def _rare(lab: Lab) -> dict[str, Any]:
    return {
        "model__name_or_path": str(lab.folder / "poisoned"),
        "data__train": str(lab.folder / "rare.jsonl"),
        "data__packing": False,
        "train__save_every": 1,
    }


def launch(lab: Lab, name: str, num_ranks: int, jobs: Sequence[Job], unfinished: Sequence[str] = ()) -> Results:
    ended = lab.launch(name, num_ranks, jobs)
    output = "\n".join(f"rank {rank}: {end.output}" for rank, end in enumerate(ended))
    assert all((end.code != 0) is bool(unfinished) for end in ended), output
    results = lab.results(name, num_ranks)
    done = [job["name"] for job in jobs if job["name"] not in unfinished]
    assert all(list(result) == done for result in results), output
    return results
