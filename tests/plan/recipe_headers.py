"""The estimates in the recipes' headers: python -m tests.plan.recipe_headers writes them."""

import re
import tempfile
from pathlib import Path

from qvtune.config.load import load_config
from qvtune.plan.plan import Request, estimate_from, estimate_of
from qvtune.plan.report import short_lines
from qvtune.versions import repository
from tests.plan.shapes import make_config_folder

# Recipe -> shapes of its model, and the cluster that it is estimated on.
CLUSTERS = {"llama3_8b_qv": ("llama3_8b", 1, 8), "llama3_70b_qv": ("llama3_70b", 8, 8)}
GPU_NAMES = ("h100-80", "a100-40")
_ESTIMATES = re.compile(r"(?<=\n)# Estimates.*?\n(?=\n)", re.DOTALL)


def recipe_file(name: str) -> Path:
    """A recipe by its name."""
    return repository() / "launch" / "recipes" / f"{name}.yaml"


def estimates(name: str) -> str:
    """The lines of a recipe's header that ``launch/plan.py`` gives."""
    shapes, nodes, gpus_per_node = CLUSTERS[name]
    lines = ["# Estimates by launch/plan.py, which gives more of them; nothing was measured on a GPU."]
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_config_folder(Path(temporary) / "model", shapes)
        run = load_config(recipe_file(name), [f"model.name_or_path={folder}"])
        first = estimate_of(run, Request(nodes, gpus_per_node, GPU_NAMES[0]))
    for gpu in GPU_NAMES:
        cluster = Request(nodes, gpus_per_node, gpu).cluster()
        shown = short_lines(estimate_from(first.setup, first.costs, cluster, first.amount), cluster)
        titles = ("Memory", "Time", "Network")
        lines.append(f"# {nodes} x {gpus_per_node} {gpu}")
        lines += [f"#   {title:9}{line}" for title, line in zip(titles, shown, strict=True)]
    return "\n".join(lines) + "\n"


def with_estimates(text: str, name: str) -> str:
    """``text``, a recipe, with its estimates made again."""
    made, count = _ESTIMATES.subn(lambda _: estimates(name), text)
    assert count == 1, f"{name}: no paragraph that starts with '# Estimates' and ends at an empty line"
    return made


if __name__ == "__main__":
    for recipe in CLUSTERS:
        recipe_file(recipe).write_text(with_estimates(recipe_file(recipe).read_text(), recipe))
