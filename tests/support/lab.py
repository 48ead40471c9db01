"""What the multi-process tests share: a model, data, runs by name, and few starts of many processes."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.forks import fork_ranks
from tests.support.processes import Finished
from tests.support.tiny import ENCODERS, make_model_folder, make_tokenizer

MAX_STEPS = 5
MAX_GRAD_NORM = 0.7  # clips some steps, not all
RARE = "§"  # stands in one row of the file ``rare.jsonl``
_WORDS = ("what", "does", "it", "do", "in", "python", "the", "name", "says", "hello", "world", "be", "kind", "user")

Job = dict[str, Any]


@dataclass(frozen=True)
class Lab:
    """A folder with ``model/``, ``train.jsonl``, ``eval.jsonl``, and a run folder for each named run."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """For processes that work here."""
        return {"QVTUNE_CACHE": str(self.folder / "cache")}

    def run_dir(self, name: str) -> Path:
        """Where a run records itself."""
        return self.folder / "runs" / name

    def config(self, name: str, **changes: Any) -> dict[str, Any]:
        """A complete run; ``changes`` are written ``section__key=value``."""
        config: dict[str, Any] = {
            "run_dir": str(self.run_dir(name)),
            "deepspeed": "zero3.json",
            "model": {"name_or_path": str(self.folder / "model")},
            "adapter": {"rank": 4, "alpha": 8.0},
            "optimizer": {"lr": 1e-2, "lr_multipliers": {"v": 4.0}, "max_grad_norm": MAX_GRAD_NORM},
            "schedule": {"warmup_ratio": 0.3, "min_ratio": 0.1},
            "data": {"train": str(self.folder / "train.jsonl"), "max_length": 64},
            "train": {"max_steps": MAX_STEPS, "global_batch_size": 6},
            "report": {"html": False, "trackers": []},  # each is a process, and there are many runs
        }
        for path, value in changes.items():
            section, _, key = path.rpartition("__")
            (config[section] if section else config)[key] = value
        return config

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        """All events of one kind that a run has recorded, in the order of the file."""
        lines = (self.run_dir(name) / "metrics.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def eval_rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of a run's eval_rows.jsonl."""
        return [json.loads(line) for line in (self.run_dir(name) / "eval_rows.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        """Of all steps; what a step gave when it ran last."""
        last = {entry["step"]: entry["loss"] for entry in self.events(name, "step")}
        assert list(last) == list(range(1, MAX_STEPS + 1)), last
        return list(last.values())

    def grad_norms(self, name: str) -> list[float]:
        """As ``losses``."""
        return list({entry["step"]: entry["grad_norm"] for entry in self.events(name, "step")}.values())

    def copy_run(self, name: str, copy: str) -> None:
        """The same run a second time, so that it can go on in two ways."""
        shutil.copytree(self.run_dir(name), self.run_dir(copy), symlinks=True)

    def launch(self, name: str, num_ranks: int, jobs: Sequence[Job]) -> list[Finished]:
        """Run jobs of tests/distributed/worker.py; returns how each rank ended."""
        folder = self.folder / "launches" / name
        folder.mkdir(parents=True)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command: list[str | Path] = ["-m", "tests.distributed.worker", folder / "jobs.json", folder]
        return fork_ranks(command, num_ranks, folder, timeout=300, **self.environment)

    def results(self, name: str, num_ranks: int) -> list[dict[str, Any]]:
        """What the jobs of a launch returned, for each rank: job -> result."""
        folder = self.folder / "launches" / name
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]


def make_lab(folder: Path, num_layers: int = 2, **options: Any) -> Lab:
    """A tiny LLaMA, one of whose matrices has two nested blocks, and rows of text."""
    make_model_folder(folder / "model", intermediate_size=301, num_layers=num_layers, **options)
    _write_rows(folder / "train.jsonl", seed=0, num_rows=60)
    _write_rows(folder / "eval.jsonl", seed=1, num_rows=7)
    return Lab(folder)


def poison(lab: Lab) -> None:
    """``poisoned/`` and ``rare.jsonl``: a model that gives NaN for one token, and rows of which one has it."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(lab.folder / "model", lab.folder / "poisoned")
    weights = lab.folder / "poisoned" / "model.safetensors"
    tensors = load_file(weights)
    rare_ids = set(make_tokenizer()(RARE)["input_ids"])
    assert not rare_ids & set(make_tokenizer()(" ".join(_WORDS))["input_ids"])
    tensors["model.embed_tokens.weight"][list(rare_ids)] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    rows = (lab.folder / "train.jsonl").read_text().splitlines()[: 6 * MAX_STEPS]  # an epoch of a run
    rows[0] = json.dumps({"prompt": RARE, "completion": " is rare"})
    (lab.folder / "rare.jsonl").write_text("\n".join(rows) + "\n")


def change_one_weight(weights: Path) -> None:
    """In the last matrix of the second layer."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] += 0.25
    save_file(tensors, weights, metadata={"format": "pt"})


def flip_a_bit(file: Path) -> None:
    """Change the last byte of a file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def add_encoders(lab: Lab, num_layers: int = 2) -> None:
    """``bert/`` and ``roberta/``, and rows with classes and with scores."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for family in ENCODERS:
        make_model_folder(lab.folder / family, family, hidden_size=60, num_layers=num_layers, **no_dropout)
    for kind in ("classes", "scores"):
        _write_labelled_rows(lab.folder, kind, seed=2, num_rows=60)
        _write_labelled_rows(lab.folder / "eval", kind, seed=3, num_rows=13)


def classifier(lab: Lab, family: str, kind: str = "classes") -> dict[str, Any]:
    """What a run of ``Lab.config`` changes to classify, or to predict scores, with an encoder or with ``model``."""
    return {
        "task": "sequence_classification",
        "model__name_or_path": str(lab.folder / family),
        "optimizer__lr_multipliers": {"v": 4.0, "head": 2.0},
        "classification": {"problem": "regression"} if kind == "scores" else {},
        "data__train": str(lab.folder / f"{kind}.jsonl"),
        "data__eval": str(lab.folder / "eval" / f"{kind}.jsonl"),
    }


def _write_labelled_rows(folder: Path, kind: str, seed: int, num_rows: int) -> None:
    """Pairs with a class out of three, or single texts with a score far from 0."""
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(num_rows):
        words = chance.choices(_WORDS, k=chance.randint(1, 9))
        row: dict[str, Any] = {"text": " ".join(words)}
        if kind == "classes":
            row |= {"text_pair": " ".join(chance.choices(_WORDS, k=2)), "label": ("no", "yes")["python" in words]}
            row["label"] = "perhaps" if "hello" in words else row["label"]
        else:
            row["label"] = 20.25 + len(words)
        rows.append(row)
    folder.mkdir(exist_ok=True)
    (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_rows(path: Path, seed: int, num_rows: int) -> None:
    chance = random.Random(seed)
    rows = [
        {
            "prompt": " ".join(chance.choices(_WORDS, k=chance.randint(2, 6))),
            "completion": " " + " ".join(chance.choices(_WORDS, k=chance.randint(2, 12))),
        }
        for _ in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
