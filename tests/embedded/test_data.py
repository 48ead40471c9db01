import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qvtune.embedded import data as demo
from qvtune.embedded.data import NUM_EVAL_ROWS, demo_files
from qvtune.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return demo_files(tmp_path_factory.mktemp("demo"))


def exchanges(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        pairs.append((user["content"], assistant["content"]))
    return pairs


def test_thousands_of_short_rows_and_a_held_out_part(files: tuple[Path, Path]) -> None:
    train, evaluation = map(exchanges, files)
    assert len(train) >= 2000
    assert len(evaluation) == NUM_EVAL_ROWS
    assert max(len(question) + len(answer) for question, answer in train + evaluation) < 1000


def test_no_question_and_no_docstring_twice(files: tuple[Path, Path]) -> None:
    rows = [row for path in files for row in exchanges(path)]
    assert len({question for question, _ in rows}) == len(rows)
    assert len({answer.split("\n\n", 1)[1] for _, answer in rows}) == len(rows)


def test_an_answer_is_the_real_signature_and_docstring(files: tuple[Path, Path]) -> None:
    answers = dict(row for path in files for row in exchanges(path))
    paragraph = (inspect.getdoc(shutil.move) or "").split("\n\n")[0]
    call = f"`shutil.move{inspect.signature(shutil.move)}`".replace(repr(shutil.copy2), "copy2")
    assert answers[f"What does {call} do in Python?"] == f"{call}\n\n{' '.join(paragraph.split())}"


def test_all_is_public_and_of_the_standard_library(files: tuple[Path, Path]) -> None:
    names = [re.search(r"`([\w.]+)(.*)`", question) for path in files for question, _ in exchanges(path)]
    assert all(names)
    for match in filter(None, names):
        assert not any(part.startswith("_") for part in match[1].split("."))
        assert match[1].split(".")[0] in sys.stdlib_module_names


def test_the_same_python_gives_the_same_bytes_and_keeps_the_files(files: tuple[Path, Path], tmp_path: Path) -> None:
    again = demo_files(tmp_path)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]
    times = [path.stat().st_mtime_ns for path in again]
    assert demo_files(tmp_path) == again
    assert [path.stat().st_mtime_ns for path in again] == times


def test_a_python_without_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda _: str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="gave 0 documented functions"):
        demo_files(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sources_are_parsed_and_never_run(tmp_path: Path) -> None:
    package = tmp_path / "asyncio"
    (package / "tests").mkdir(parents=True)
    (package / "tests" / "test_it.py").write_text('def f():\n    """A docstring that is long enough."""\n')
    (package / "_private.py").write_text('def f():\n    """A docstring that is long enough."""\n')
    (package / "__init__.py").write_text(
        "raise SystemExit('was run')\n"
        "class A:\n"
        '    """What an A is,\n    in two lines.\n\n    More."""\n'
        "    def m(self, x: int = 1, *args: str, y) -> None:\n"
        '        """Do something with x and y."""\n'
        "    @staticmethod\n"
        "    def s(x):\n"
        '        """Do something with x alone."""\n'
        "    @property\n"
        "    def p(self):\n"
        '        """The value that was set."""\n'
        "@_special\n"
        "def special(self, x):\n"
        '    """Made into something else."""\n'
        "async def too_short():\n"
        '    """Short."""\n'
    )
    rows: list[Any] = demo._rows(tmp_path)
    assert sorted(row["messages"][1]["content"] for row in rows) == [
        "`asyncio.A.m(x=1, *args, y)`\n\nDo something with x and y.",
        "`asyncio.A.p`\n\nThe value that was set.",
        "`asyncio.A.s(x)`\n\nDo something with x alone.",
        "`asyncio.A`\n\nWhat an A is, in two lines.",
    ]
