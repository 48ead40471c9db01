"""The doctor's table on the console."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qvtune.doctor.findings import Finding, Verdict, to_exclude

_STYLES = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fail": "[bold red]FAIL[/]"}
_ORDER = ("fail", "note", "ok")


def show(found: Sequence[Verdict], hosts: Sequence[str], seconds: float, console: Console) -> None:
    """Print one table, failures first; below it GO if there are none."""
    table = Table("", "check", "nodes", "found", "what to do", title=f"doctor: {len(hosts)} nodes, {seconds:.0f} s")
    for status in _ORDER:
        for finding, on in _grouped(found, status):
            row = (finding.check, _names(on, hosts), finding.detail, finding.remedy)
            table.add_row(_STYLES[status], *map(escape, row))
    console.print(table)
    if all(finding.status != "fail" for _, finding in found):
        console.print("GO")


def verdict(found: Sequence[Verdict], hosts: Sequence[str]) -> str:
    """The reason why a run must not start, in one line, with the option that excludes the nodes at fault."""
    bad = to_exclude(found, hosts)
    if bad and len(bad) < len(hosts):
        return f"NO-GO because of {', '.join(bad)}; to run on the other nodes: --exclude={','.join(bad)}"
    return "NO-GO: correct what the table shows; excluding nodes does not help"


def _grouped(found: Iterable[Verdict], status: str) -> list[tuple[Finding, list[str]]]:
    """One row per finding, with all its nodes. Of an ``ok`` check one row in total, with the first node's detail."""
    rows: dict[tuple[str, ...], tuple[Finding, list[str]]] = {}
    for host, finding in found:
        if finding.status == status:
            key = (finding.check,) if status == "ok" else (finding.check, finding.detail)
            rows.setdefault(key, (finding, []))[1].append(host)
    return list(rows.values())


def _names(on: Sequence[str], hosts: Sequence[str]) -> str:
    names = list(dict.fromkeys(on))
    return "all" if len(names) == len(hosts) > 1 else ", ".join(names)
