"""The floors of the package: a room imports from lower floors only, and one room alone talks to other ranks."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

# From the top down. A room is a subpackage or a module of qvtune. Rooms on one line do not import each other.
FLOORS = (
    ("demo",),
    ("study",),
    ("submit",),
    ("plan",),
    ("doctor",),
    ("train",),
    ("convert",),
    ("tasks",),
    ("checkpoint",),
    ("optim",),
    ("model",),
    ("data",),
    ("report",),
    ("embedded",),
    ("config",),
    ("distributed",),
    ("storage",),
    ("console", "errors", "system", "versions"),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Set by launchers; qvtune.distributed reads them for everybody.
RANK_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def modules() -> list[Path]:
    found = sorted((SRC / "qvtune").rglob("*.py"))
    assert len(found) > 80
    return found


def room_of(path: Path) -> str:
    """``qvtune/model/nf4.py`` -> ``model``; ``qvtune/console.py`` -> ``console``."""
    return path.relative_to(SRC / "qvtune").parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, wherever they are in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(room: str, source: str) -> list[str]:
    """What ``source``, as a module of ``room``, must not import or read."""
    tree, found = ast.parse(source), []
    for name in imported_modules(tree):
        parts = name.split(".")
        if parts[0] == "qvtune" and len(parts) > 1 and parts[1] != room and parts[1] in FLOOR_OF:
            if FLOOR_OF[parts[1]] <= FLOOR_OF[room]:
                found.append(f"{room} imports {name}, which is not on a lower floor")
        elif name.startswith(("torch.distributed", "deepspeed.comm")) and room != "distributed":
            found.append(f"{room} imports {name}; only qvtune.distributed does")
    if room != "distributed":
        words = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found += [f"{room} reads {name}; only qvtune.distributed does" for name in sorted(words & RANK_VARIABLES)]
    return found


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in modules()} - {"__init__"}
    assert rooms <= FLOOR_OF.keys()


def test_imports_go_down_and_only_one_room_talks_to_other_ranks() -> None:
    found = [
        f"{path.relative_to(SRC)}: {problem}"
        for path in modules()
        if path.parent != SRC / "qvtune" or path.stem != "__init__"
        for problem in violations(room_of(path), path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_the_documented_floors_are_these() -> None:
    """CONTRIBUTING.md shows the same table."""
    text = (SRC.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.split("## Floors")[1].split("```")[1]
    shown = [tuple(re.split(r"  +", line)[0].split(", ")) for line in block.strip().splitlines()]
    assert shown == [tuple(rooms) for rooms in FLOORS]


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("config", "from qvtune.model import nf4"),
        ("storage", "def late():\n    from qvtune.train.loop import train"),
        ("plan", "import qvtune.submit.submit"),
        ("checkpoint", "import torch.distributed as dist"),
        ("train", "from torch import distributed"),
        ("report", "from deepspeed import comm"),
        ("data", "import os\nfirst = os.environ['LOCAL_RANK'] == '0'"),
    ],
)
def test_a_forbidden_import_is_noticed(room: str, source: str) -> None:
    assert len(violations(room, source)) == 1


def test_an_allowed_import_is_not() -> None:
    assert violations("train", "from qvtune.model import nf4\nfrom qvtune.train.loop import train") == []
