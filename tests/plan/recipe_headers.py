"""The estimates in the recipes' headers: python -m tests.plan.recipe_headers writes them."""

import math
import re
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

from qvtune.config.load import load_config
from qvtune.config.schema import RunConfig
from qvtune.plan.memory import costs_of
from qvtune.plan.plan import Request, estimate_from, estimate_of, setup_of
from qvtune.plan.report import Estimate, short_lines
from qvtune.study.cell import read_grid
from qvtune.versions import repository
from tests.plan.shapes import make_config_folder

# Recipe -> shapes of its model, and the cluster that it is estimated on.
CLUSTERS = {
    "llama3_8b_qv": ("llama3_8b", 1, 8),
    "llama3_70b_qv": ("llama3_70b", 8, 8),
    "paper/roberta_base_glue": ("roberta_base", 1, 1),
    "paper/llama31_8b_glue": ("llama3_8b", 1, 8),
}
# Grid of runs -> its recipe.
GRIDS = {
    "paper/table2_small_grid": "paper/roberta_base_glue",
    "paper/table2_large_grid": "paper/roberta_base_glue",
    "paper/heatmap_grid": "paper/llama31_8b_glue",
}
GLUE_ROWS = {  # of the training sets
    "cola": 8_551,
    "sst2": 67_349,
    "mrpc": 3_668,
    "stsb": 5_749,
    "qqp": 363_846,
    "mnli": 392_702,
    "qnli": 104_743,
    "rte": 2_490,
}
GPU_NAMES = ("h100-80", "a100-40")
_ESTIMATES = re.compile(r"(?<=\n)# Estimates.*?\n(?=\n)", re.DOTALL)
_SOURCE = "# Estimates by launch/plan.py, which gives more of them; nothing was measured on a GPU."


def recipe_file(name: str) -> Path:
    """A recipe, or a grid, by its name."""
    return repository() / "launch" / "recipes" / f"{name}.yaml"


@cache
def _estimates_on(recipe: str) -> dict[str, Estimate]:
    """Of a recipe, by the name of the GPU."""
    shapes, nodes, gpus_per_node = CLUSTERS[recipe]
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_config_folder(Path(temporary) / "model", shapes)
        run = load_config(recipe_file(recipe), [f"model.name_or_path={folder}"])
        first = estimate_of(run, Request(nodes, gpus_per_node, GPU_NAMES[0]))
        found = {GPU_NAMES[0]: first}
        for gpu in GPU_NAMES[1:]:
            cluster = Request(nodes, gpus_per_node, gpu).cluster()
            setup, choice = setup_of(run, cluster)
            is_same = setup.deepspeed_config == first.setup.deepspeed_config
            costs = first.costs if is_same else costs_of(setup, cluster.num_gpus)
            found[gpu] = estimate_from(setup, costs, cluster, first.amount, choice)
    return found


def estimates(name: str) -> str:
    """The lines of a header that ``launch/plan.py`` gives."""
    return "\n".join([_SOURCE, *(_of_grid(name) if name in GRIDS else _of_recipe(name))]) + "\n"


def _of_recipe(name: str) -> list[str]:
    _, nodes, gpus_per_node = CLUSTERS[name]
    lines = []
    for gpu, estimate in _estimates_on(name).items():
        shown = short_lines(estimate, Request(nodes, gpus_per_node, gpu).cluster())
        titles = [*(["Stage"] if estimate.choice is not None else []), "Memory", "Time", "Network"]
        lines.append(f"# {nodes} x {gpus_per_node} {gpu}")
        lines += [f"#   {title:9}{line}" for title, line in zip(titles, shown, strict=True)]
        if name.startswith("paper/"):
            steps = steps_of(estimate.setup.run)
            lines.append(f"#   {'Run':9}{steps:,} steps: {_hours(estimate, steps)} hours")
    return lines


def _of_grid(name: str) -> list[str]:
    """Runs and steps by task, and the hours of all, with the time of a step that the recipe itself has."""
    recipe = GRIDS[name]
    _, nodes, gpus_per_node = CLUSTERS[recipe]
    runs: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    for cell in read_grid(recipe_file(name)).cells:
        task = str(cell.factors["task"])
        runs[task] += 1
        steps[task] += steps_of(load_config(recipe_file(recipe), cell.overrides))
    by_task = "; ".join(f"{task} {runs[task]:,} x {steps[task] // runs[task]:,}" for task in runs)
    lines = [f"#   {runs.total():,} runs with {steps.total():,} steps: {by_task}"]
    for gpu, estimate in _estimates_on(recipe).items():
        lines.append(f"#   {nodes} x {gpus_per_node} {gpu}: {_hours(estimate, steps.total())} hours, one run at a time")
    return lines


def steps_of(run: RunConfig) -> int:
    """Optimizer steps of a run on a task of GLUE without packing."""
    if run.train.max_steps is not None:
        return run.train.max_steps
    assert run.train.epochs is not None and not run.data.packing
    (source,) = run.data.train_sources
    return math.ceil(run.train.epochs * GLUE_ROWS[str(source.glue)] / run.train.global_batch_size)


def _hours(estimate: Estimate, steps: int) -> str:
    low, high = (steps * seconds / 3600 for seconds in (estimate.time.low, estimate.time.high))
    return f"{low:,.2g} to {high:,.2g}" if high < 100 else f"{low:,.0f} to {high:,.0f}"


def with_estimates(text: str, name: str) -> str:
    """``text``, a recipe or a grid, with its estimates made again."""
    made, count = _ESTIMATES.subn(lambda _: estimates(name), text)
    assert count == 1, f"{name}: no paragraph that starts with '# Estimates' and ends at an empty line"
    return made


if __name__ == "__main__":
    for recipe in sys.argv[1:] or [*CLUSTERS, *GRIDS]:
        recipe_file(recipe).write_text(with_estimates(recipe_file(recipe).read_text(), recipe))
