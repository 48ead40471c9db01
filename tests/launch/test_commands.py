"""All commands of launch/: their --help has one structure, and a typo is answered before anything heavy is imported."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY

COMMANDS = sorted((REPOSITORY / "launch").glob("*.py"), key=lambda path: path.stem)
# Of a command whose first argument says what it does.
PARTS = {"study": ("grid", "toy", "bounds", "table", "suggest", "attention")}
HELPS = [(path, part) for path in COMMANDS for part in ("", *PARTS.get(path.stem, ()))]
HEAVY = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "numpy")
# Runs a script as its own interpreter would, then says on the last line which of HEAVY it has imported.
_RUN = f"""
import runpy, sys
sys.argv = sys.argv[1:]
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    code = error.code
print("imported:", *(name for name in {HEAVY!r} if name in sys.modules))
sys.exit(code)
"""
# Command -> arguments with something wrong, and what the message must name.
WRONG = {
    "train": [
        (["--config", "{recipe}", "train.max_step=3"], "`train.max_steps`?"),
        (["--config", "{folder}/none.yaml"], "none.yaml: the configuration cannot be read"),
        (["--config", "{recipe}", "--show-batch", "train.max_steps=3"], "not a whole number > 0; where something else"),
        (["--config", "{recipe}", "--show-batch=0"], "--show-batch: '0' is not a whole number > 0"),
        (["--config", "{recipe}", "train.max_step=3", "--show-batch"], "`train.max_steps`?"),
        (["--show-batch"], "--config RECIPE.yaml is required"),
    ],
    "submit": [
        (["--nodes=1", "--gpus-per-node=1", "--config", "{recipe}", "train.max_step=3"], "`train.max_steps`?"),
        (["--nodes=1", "--gpus-per-node=1", "--config", "{folder}"], "the configuration cannot be read"),
    ],
    "plan": [
        (["--gpus-per-node=8", "--gpu=h100-80", "--config", "{recipe}", "train.max_step=3"], "`train.max_steps`?"),
        (["--gpus-per-node=8", "--gpu=h100", "--config", "{recipe}"], "invalid choice: 'h100'"),
    ],
    "study": [
        ([], "the following arguments are required: COMMAND"),
        (["toi"], "invalid choice: 'toi'"),
        (["grid", "{folder}/none.yaml"], "none.yaml: the configuration cannot be read"),
        (["grid", "{recipe}"], "`train` is not a setting; allowed: recipe, run_dir, tasks, cells, factors"),
        (["toy", "--output={folder}/out", "--seeds=0"], "--seeds: '0' is not a whole number > 0"),
        (["toy"], "the following arguments are required: --output"),
        (["bounds", "{recipe}", "train.max_step=3"], "`train.max_steps`?"),
        (["attention", "{folder}/none"], "none: no checkpoint"),
        (["table", "{folder}"], "is no study; give a folder whose grid.yaml"),
        (["table", "{folder}", "--target-loss=low"], "--target-loss: 'low' is not a loss, as 0.25"),
        (["suggest", "{recipe}", "--budget=10%", "--output={folder}/out", "train.max_step=3"], "`train.max_steps`?"),
        (["suggest", "{recipe}", "--budget=ten", "--output={folder}/out"], "'ten' is no number of runs > 0, as in 17"),
        (["bounds", "{recipe}", "--rows=many"], "--rows: 'many' is not a whole number > 0"),
    ],
    "doctor": [(["--config", "{recipe}", "train.max_step=3"], "`train.max_steps`?")],
    "convert": [(["{folder}/none", "--output", "{folder}/out"], "none: no checkpoint")],
    "quantize": [(["{folder}/none", "--output", "{folder}/out"], "none' is not a folder")],
}


def run(command: Path, *arguments: str) -> tuple[int, str, str, list[str]]:
    """Exit code, standard output and error, and the heavy modules that were imported."""
    words = [sys.executable, "-c", _RUN, str(command), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    output, _, imported = done.stdout.rpartition("imported:")
    return done.returncode, output, done.stderr, imported.split()


@cache
def help_of(command: Path, part: str = "") -> str:
    code, output, error, imported = run(command, *part.split(), "--help")
    assert (code, error, imported) == (0, "", []), (command, imported, error)
    return output


def test_discovery_finds_the_commands() -> None:
    assert {path.stem for path in COMMANDS} >= {"convert", "doctor", "quantize", "submit", "train"}


def test_the_parts_of_a_command_are_all_looked_at() -> None:
    for name, parts in PARTS.items():
        listed = re.findall(r"^    (\w+)(?: |$)", help_of(REPOSITORY / "launch" / f"{name}.py"), re.MULTILINE)
        assert tuple(listed) == parts


@pytest.mark.parametrize(("command", "part"), HELPS, ids=lambda value: getattr(value, "stem", value))
def test_help_has_purpose_example_options_and_exit_codes(command: Path, part: str) -> None:
    usage, purpose, *parts = help_of(command, part).split("\n\n")
    assert usage.startswith(f"usage: {command.name} {part}")
    assert "\n" not in purpose and purpose.endswith(".")
    titles = [part.partition("\n")[0] for part in parts if re.match(r"[A-Za-z ]+:\n", part)]
    assert [title for title in titles if title != "positional arguments:"] == ["Example:", "options:", "Exit codes:"]
    example = next(part for part in parts if part.startswith("Example:\n"))
    assert all(f"launch/{command.name} {part}" in line for line in example.splitlines()[1:]), example
    codes = re.findall(r"^  (\w+) +\S", parts[-1], re.MULTILINE)
    assert codes[0] == "0" and "2" in codes and len(codes) == len(parts[-1].splitlines()) - 1


@pytest.mark.parametrize(("command", "part"), HELPS, ids=lambda value: getattr(value, "stem", value))
def test_every_argument_is_explained(command: Path, part: str) -> None:
    text = help_of(command, part)
    sections = [text.partition(title)[2].partition("\n\n")[0] for title in ("positional arguments:", "options:")]
    listed = [entry for section in sections for entry in re.split(r"\n  (?=[\w-])", section)[1:]]
    assert len(listed) > 1
    assert [entry for entry in listed if not re.search(r"(\n {4,}|\S {2,})\S", entry)] == []


@pytest.mark.parametrize(
    ("name", "arguments", "said"), [(name, *case) for name, cases in WRONG.items() for case in cases]
)
def test_a_mistake_is_answered_before_anything_heavy_is_imported(
    tmp_path: Path, name: str, arguments: list[str], said: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run_dir: runs/x\ntrain: {max_steps: 3}\n")
    words = [word.format(folder=tmp_path, recipe=recipe) for word in arguments]
    code, _, error, imported = run(REPOSITORY / "launch" / f"{name}.py", *words)
    assert code == 2 and said in error, error
    assert imported == []


def test_the_settings_are_shown_without_a_recipe_and_without_torch() -> None:
    code, output, error, imported = run(REPOSITORY / "launch" / "train.py", "--settings", "optimizer")
    assert (code, error, imported) == (0, "", []) and "optimizer.lr_multipliers" in output
    assert "checkpoint.keep" in run(REPOSITORY / "launch" / "train.py", "--settings")[1]


def test_a_run_needs_a_recipe() -> None:
    code, _, error, imported = run(REPOSITORY / "launch" / "train.py", "train.max_steps=3")
    assert code == 2 and "--config RECIPE.yaml is required" in error and imported == []


def test_the_compiler_of_torch_is_not_imported() -> None:
    """bitsandbytes and DeepSpeed would import it with functions that this project does not call."""
    program = """
import sys
from qvtune.distributed.command import run_alone

def imports():
    import bitsandbytes, deepspeed

assert run_alone(imports) == 0
print("torch.optim" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
"""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    environment.pop("TORCHDYNAMO_DISABLE", None)
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "True False"
