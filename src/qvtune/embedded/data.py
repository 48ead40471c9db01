"""The embedded data set: questions on the Python standard library, answered by its own docstrings."""

import ast
import hashlib
import json
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from qvtune.errors import UserError
from qvtune.storage.atomic import atomic_folder

VERSION = 1  # raise it whenever the rows change
NUM_EVAL_ROWS = 100
MIN_ROWS = 1000
MIN_SUMMARY_CHARACTERS, MAX_SUMMARY_CHARACTERS = 20, 400
MAX_ARGUMENTS_CHARACTERS = 90
SKIPPED_PARTS = {"antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "this", "turtledemo"}
PROPERTIES = {"property", "cached_property", "DynamicClassAttribute", "setter"}

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Entry:
    """A documented function, method, property or class.

    ``signature`` is how it is called, a name alone where it is not; ``summary`` is its docstring's first paragraph.
    """

    qualified_name: str
    signature: str
    summary: str


def demo_files(cache_dir: Path) -> tuple[Path, Path]:
    """Return the JSONL files (train, eval) of chat rows, made on first use from the sources of the running Python.

    The sources are parsed, never run. The rows are the same for the same Python version; no question and no docstring
    is in both files; eval has NUM_EVAL_ROWS rows. UserError if this Python comes without its sources.
    """
    folder = cache_dir / f"stdlib-qa-py{platform.python_version()}-v{VERSION}"
    if not folder.is_dir():
        stdlib = Path(sysconfig.get_path("stdlib"))
        rows = _rows(stdlib)
        if len(rows) < MIN_ROWS:
            raise UserError(
                f"The demo data is made from the sources of Python's standard library, but {stdlib} gave {len(rows)} "
                f"documented functions and classes, fewer than {MIN_ROWS}. Use a Python that comes with its sources, "
                "or set data.train and data.eval to JSONL files of your own."
            )
        with atomic_folder(folder, if_taken="keep") as private:
            _write(private / "train.jsonl", rows[NUM_EVAL_ROWS:])
            _write(private / "eval.jsonl", rows[:NUM_EVAL_ROWS])
    return folder / "train.jsonl", folder / "eval.jsonl"


def _rows(stdlib: Path) -> list[dict[str, object]]:
    """Return one row a distinct summary, ordered by a hash of the name: any slice is a fair sample."""
    by_summary: dict[str, Entry] = {}
    for module, path in _sources(stdlib):
        for entry in _entries(ast.parse(path.read_bytes()).body, module):
            by_summary.setdefault(entry.summary, entry)
    entries = {entry.qualified_name: entry for entry in by_summary.values()}.values()
    return [_row(entry) for entry in sorted(entries, key=lambda entry: _stable_hash(entry.qualified_name))]


def _sources(stdlib: Path) -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, file) of the public modules written in Python, sorted."""
    for name in sorted(sys.stdlib_module_names):
        for path in sorted([stdlib / f"{name}.py", *(stdlib / name).rglob("*.py")]):
            parts = PurePath(path.relative_to(stdlib)).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if path.is_file() and not SKIPPED_PARTS.intersection(parts) and not any(map(_is_private, parts)):
                yield ".".join(parts), path


def _entries(body: Iterable[ast.stmt], owner: str, in_class: bool = False) -> Iterator[Entry]:
    for node in body:
        if not isinstance(node, Documented) or _is_private(node.name):
            continue
        name = f"{owner}.{node.name}"
        summary = _summary(node)
        # A private decorator, such as typing's _SpecialForm, makes something else of a function than its source shows.
        if summary and not any(map(_is_private, _decorators(node))):
            yield Entry(name, _signature(node, name, in_class), summary)
        if isinstance(node, ast.ClassDef):
            yield from _entries(node.body, name, in_class=True)


def _decorators(node: Documented) -> set[str]:
    """Return the last names of the decorators: `cached_property` for `@functools.cached_property`."""
    expressions = [item.func if isinstance(item, ast.Call) else item for item in node.decorator_list]
    return {ast.unparse(expression).rsplit(".")[-1] for expression in expressions}


def _summary(node: Documented) -> str | None:
    paragraph = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
    summary = " ".join(paragraph.split())
    fits = MIN_SUMMARY_CHARACTERS <= len(summary) <= MAX_SUMMARY_CHARACTERS
    return summary if fits and ">>>" not in summary else None


def _signature(node: Documented, name: str, in_class: bool) -> str:
    decorators = _decorators(node)
    if isinstance(node, ast.ClassDef) or PROPERTIES.intersection(decorators):
        return name
    arguments = node.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    positional = arguments.posonlyargs or arguments.args
    if in_class and positional and "staticmethod" not in decorators:
        positional.pop(0)  # self or cls
    text = ast.unparse(arguments)
    return f"{name}({text if len(text) <= MAX_ARGUMENTS_CHARACTERS else '...'})"


def _row(entry: Entry) -> dict[str, object]:
    question = f"What does `{entry.signature}` do in Python?"
    answer = f"`{entry.signature}`\n\n{entry.summary}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _is_private(name: str) -> bool:
    return name.startswith("_")


def _stable_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
