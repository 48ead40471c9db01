"""A search whose runs are synthetic: python -m tests.study.suggest_worker FOLDER MODEL_FOLDER

A run writes its folder as training does, line by line, so that it can be killed in the middle.
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qvtune.config.schema import RunConfig
from qvtune.study.cell import Cell
from qvtune.study.search import Rates, Trial
from qvtune.study.suggest import Request, search_all, search_of
from qvtune.study.suggest_report import write
from qvtune.study.worker import FAILED
from tests.support.synthetic import KINDS, Landscape

STEPS = 400
REQUEST = Request(budget=24.0)
LANDSCAPE = replace(KINDS["lambda 8 is better"], number=1)


def recipe(**sections: object) -> RunConfig:
    """A recipe with lambda = 4; nothing of it is run."""
    return RunConfig.model_validate(
        {
            "run_dir": "runs/recipe",
            "optimizer": {"lr": 2e-4, "lr_multipliers": {"v": 4.0}},
            "data": {"eval": "demo"},
            "train": {"max_steps": STEPS},
            **sections,
        }
    )


def run_cell(folder: Path, cell: Cell, landscape: Landscape, pause: float = 0.0) -> None:
    """What training leaves of a cell, written slowly; rates that are too high fail."""
    settings = dict(one.split("=", 1) for one in cell.overrides)
    lr, multiplier = float(settings["optimizer.lr"]), json.loads(settings["optimizer.lr_multipliers"])["v"]
    trial = Trial(
        Rates(lr, float(f"{lr * multiplier:.2e}")), int(settings["train.max_steps"]), int(settings["train.seed"])
    )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if trial.rates.v > 5e-3:
        (folder / FAILED).write_text("step 7: the loss is nan\n")
        return
    outcome = landscape.run(trial, STEPS)
    assert outcome.losses is not None and outcome.tokens is not None
    rows = {"loss": outcome.losses.tolist(), "tokens": outcome.tokens.tolist()}
    events = [{"event": "step", "step": trial.steps, "loss": 1.0}, {"event": "run_end", "step": trial.steps}]
    before = {"step": 0, "set": "eval", "loss": [9.0], "tokens": [1]}
    with (folder / "eval_rows.jsonl").open("w") as file:
        file.write(json.dumps(before) + "\n" + json.dumps({"step": trial.steps, "set": "eval", **rows}) + "\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for event in events:
            file.write(json.dumps({**event, "reason": "completed"}) + "\n")
            file.flush()
            time.sleep(pause)


def search(folder: Path, pause: float = 0.0) -> None:
    """The whole search, with its verdict written."""
    run = recipe()
    settings = search_of(run, STEPS, REQUEST)

    def evaluate(cells: Sequence[Cell]) -> None:
        for cell in cells:
            run_cell(folder / "cells" / cell.name, cell, LANDSCAPE, pause)

    verdict, results = search_all(folder, run, settings, evaluate)
    write(folder, verdict, settings, results, run)


if __name__ == "__main__":
    search(Path(sys.argv[1]), pause=0.05)
