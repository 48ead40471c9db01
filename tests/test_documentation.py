"""READMEs and CONTRIBUTING.md: every path exists, every command in them could be typed as it is."""

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest

from qvtune.config.load import load_config
from qvtune.study.cell import read_grid
from tests.test_repository import ROOT, make_targets, repository_files

DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "launch/README.md",
    "launch/recipes/repeated/results/README.md",
    "slurm/README.md",
    "ds_configs/README.md",
    "tests/faults/README.md",
)
_PATH = re.compile(r"\b(?:launch|ds_configs|src|tests|slurm)/[\w./-]*\w")
_MADE_BY_THE_USER = {"slurm/cluster.env"}
# A word that stands for something that the reader has: RECIPE, DIR, N, RECIPE.yaml, merged/..., an ellipsis.
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_-]*(\.\w+)?(-nf4)?|\.\.\.")


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def code_of(document: str) -> list[str]:
    """Lines of code blocks, without trailing comments, and code in sentences."""
    text = re.sub(r"<!-- (?:help|settings).*?<!-- end -->", "", text_of(document), flags=re.DOTALL)
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    sentences = re.sub(r"^```\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return lines + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", sentences)]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Document and words of each command of this project in it."""
    starts = ("python", "deepspeed", "sbatch", "srun", "pytest", "torchrun")
    for document in DOCUMENTS:
        for line in code_of(document):
            words = shlex.split(line.replace("[section.key=value ...]", "")) if line.split(" ")[0] in starts else []
            if len(words) > 1 and any(_PATH.fullmatch(word) or word == "-m" for word in words):
                yield document, words


COMMANDS = [pytest.param(words, id=f"{document}: {' '.join(words)}"[:90]) for document, words in commands()]


def tree_paths() -> set[str]:
    """The paths of the annotated tree; two spaces of indentation are one level."""
    block = text_of("CONTRIBUTING.md").split("## What is where")[1].split("```")[1]
    parents: list[str] = []
    paths = set()
    for line in block.strip().splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        paths.add("".join([*parents[:depth], name]))
        parents[depth:] = [name]
    return paths


def test_every_readme_is_looked_at() -> None:
    found = {str(file) for file in repository_files() if file.name in ("README.md", "CONTRIBUTING.md")}
    assert found == set(DOCUMENTS)


def test_every_path_of_the_tree_exists() -> None:
    paths = tree_paths()
    assert len(paths) > 15
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []
    assert sorted(path for path in paths if path.endswith("/") != (ROOT / path).is_dir()) == []


def test_the_tree_names_every_top_level_entry_and_every_package() -> None:
    top_level = {f"{file.parts[0]}/" if len(file.parts) > 1 else file.name for file in repository_files()}
    packages = {f"{file.parent}/" for file in repository_files() if file.match("src/qvtune/*/__init__.py")}
    named = tree_paths() | {path.split("/")[0] + "/" for path in tree_paths() if "/" in path}
    assert sorted((top_level | packages) - named - {"src/"}) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_is_mentioned_exists(document: str) -> None:
    mentioned = {path for path in _PATH.findall(text_of(document)) if "NAME" not in path}
    assert len(mentioned) > (0 if document == "ds_configs/README.md" else 2)
    assert sorted(path for path in mentioned - _MADE_BY_THE_USER if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(document)):
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.is_file(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_every_make_target_that_is_named_exists() -> None:
    named = {
        target
        for document in DOCUMENTS
        for code in code_of(document)
        for target in re.findall(r"^make ([a-z-]+)", code)
    }
    assert {"demo", "test", "env", "lint", "lock"} <= named
    assert named <= make_targets()


def test_the_first_screen_has_what_why_proof_and_the_two_commands() -> None:
    screen = text_of("README.md").split("## Your data")[0]
    assert len(screen.splitlines()) <= 60
    for part in ("![", "held-out loss", "merged = base + adapter", "Why", "make demo", "make test"):
        assert part in screen


def test_discovery_finds_commands_of_all_kinds() -> None:
    typed = [" ".join(parameter.values[0]) for parameter in COMMANDS]  # type: ignore[arg-type]
    assert len(typed) > 20
    for part in (
        "launch/train.py",
        "launch/convert.py",
        "launch/quantize.py",
        "launch/submit.py",
        "launch/plan.py",
        "launch/doctor.py",
    ):
        assert any(part in line for line in typed), part
    for part in ("slurm/train.sbatch", "slurm/convert.sbatch", "slurm/sweep.sbatch", "python -m", "pytest -s"):
        assert any(part in line for line in typed), part


@cache
def help_of(command: str, *part: str) -> str:
    words = [sys.executable, str(ROOT / command), *part, "--help"]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_could_be_typed_as_it_is(words: list[str]) -> None:
    """Scripts, modules, recipes and options exist; settings after a recipe are accepted."""
    for module in [words[place + 1] for place, word in enumerate(words) if word == "-m"]:
        assert importlib.util.find_spec(module) is not None, module
    files = [word for word in words if _PATH.fullmatch(word) and word not in _MADE_BY_THE_USER]
    assert all((ROOT / file).exists() for file in files), files
    script = next((file for file in files if file.startswith("launch/") and file.endswith(".py")), None)
    arguments = words[words.index(script) + 1 :] if script else []
    part = arguments[:1] if script == "launch/study.py" else []
    for option in [word.partition("=")[0] for word in arguments if word.startswith("--")]:
        assert re.search(rf"{option}\b", help_of(str(script), *part)), option
    recipes = [ROOT / file for file in files if file.endswith(".yaml")]
    given = words[words.index(str(recipes[0].relative_to(ROOT))) + 1 :] if recipes else []
    overrides = [word for word in given if re.match(r"[a-z_.]+=", word)]
    assert all(_PLACEHOLDER.fullmatch(word) or word.startswith("--") or word in overrides for word in given), given
    for recipe in recipes:
        read = read_grid if recipe.stem.endswith("_grid") else load_config
        read(recipe, overrides)
